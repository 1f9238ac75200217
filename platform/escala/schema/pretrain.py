"""The `pretrain` workload."""

from __future__ import annotations

from pydantic import Field, model_validator

from escala.schema.attention import KINDS
from escala.schema.data import DataConfig
from escala.schema.training import TrainedConfig

MASS_IN_WINDOW, WINDOW_OF_MASS = "attention_mass_in_window", "attention_window_tokens"
"""Measures of a run that has `measure_attention_window`: a share, and the window in tokens."""


class PretrainConfig(TrainedConfig):
    """The `pretrain` workload."""

    data: DataConfig = DataConfig()
    measure_attention_window: int | None = Field(
        None,
        gt=0,
        description="tokens of a window: evaluations measure which share of exact attention's mass lies in it",
    )

    @model_validator(mode="after")
    def _window_can_be_measured(self) -> PretrainConfig:
        window, kind = self.measure_attention_window, self.model.attention.kind
        if window is None:
            return self
        if kind != KINDS.default:
            raise ValueError(
                f"measure_attention_window needs {KINDS.default} attention, which weighs every key; this is {kind}"
            )
        if window >= self.context_tokens:
            raise ValueError(
                f"measure_attention_window {window} leaves nothing outside of a context of {self.context_tokens} tokens"
            )
        return self

    @model_validator(mode="after")
    def _vocabulary_fits(self) -> PretrainConfig:
        recall = self.data.recall
        if recall is not None:
            if recall.vocab_size > self.model.vocab_size:
                raise ValueError(
                    f"the recall corpus has {recall.keys} keys and {recall.values} values: "
                    f"model.vocab_size {self.model.vocab_size} must be at least {recall.vocab_size}"
                )
            recall.check_context(self.context_tokens)
            recall.check_length(self.context_tokens, self.total_steps * self.training.batch_sequences)
        elif self.data.tokenizer.path is None and self.data.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size {self.data.tokenizer.vocab_size} does not fit "
                f"model.vocab_size {self.model.vocab_size}"
            )
        return self
