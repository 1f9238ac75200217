"""The `pretrain` workload."""

from __future__ import annotations

from pydantic import model_validator

from escala.schema.data import DataConfig
from escala.schema.training import TrainedConfig


class PretrainConfig(TrainedConfig):
    """The `pretrain` workload."""

    data: DataConfig = DataConfig()

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
