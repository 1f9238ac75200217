"""The `convert` and `auto_features` workloads: an exact model given another kind of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from escala.schema.attention import KINDS, AttentionKind, AttentionSection, FeaturesConfig
from escala.schema.data import TokenizerConfig
from escala.schema.finetune import CONTEXT_TOKENS
from escala.schema.model import ModelConfig
from escala.schema.pretrain import PretrainConfig
from escala.schema.pretrained import model_config_of
from escala.schema.training import StartConfig

CHOSEN = ("attention", "window_tokens", "features")  # keys of the converted model, beside those of its start
EXACT: dict[str, Any] = {"attention": {}, "window_tokens": None, "features": None}
FIRST_COUNT = 32


class ConvertConfig(PretrainConfig):
    """The `convert` workload: an exact model into another kind of attention, with a short distillation (Zhang et al.
    2024, Hedgehog; arXiv:2410.10254, LoLCATs). Attention's weights alone are trained, those of the kind and the
    projections, so a checkpoint holds these, and stands on its start. `model` follows from `start`.
    """

    keeps_reference: ClassVar[bool] = True
    forward_passes: ClassVar[int] = 1  # the exact model's
    trains_attention_alone: ClassVar[bool] = True

    start: StartConfig
    attention: AttentionSection = Field(
        KINDS.read("hybrid"), description="of the converted model: a kind's name, or a section"
    )
    window_tokens: int | None = Field(None, gt=0, description="as model.window_tokens")
    features: FeaturesConfig | None = Field(None, description="as model.features")
    transfer_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="of the steps: layer by layer, attention's output is fitted to the exact one's (squared error); "
        "the rest train the loss",
    )
    kl_weight: float = Field(
        1.0,
        ge=0,
        description="of KL(exact || converted) beside the next token's loss, in the steps of the loss",
    )

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, data: Any) -> Any:
        """`model`: the start's, or what is written of it, with the keys of CHOSEN in place of its own."""
        if not isinstance(data, dict) or not isinstance(data.get("start"), dict):
            return data
        path, model = data["start"].get("path"), data.get("model")
        if not model:
            if path is None:
                return data
            model = model_config_of(Path(path).expanduser())
            _check_exact(model.attention, path)
        plain = model.model_dump() if isinstance(model, ModelConfig) else model
        if not isinstance(plain, dict):
            return data
        defaults = {name: cls.model_fields[name].default for name in CHOSEN}
        chosen = {**defaults, **{k: data[k] for k in CHOSEN if k in data}}
        wanted, written = KINDS.read(chosen["attention"]), KINDS.read(plain.get("attention", {}))
        if chosen["window_tokens"] is not None:
            wanted = wanted.with_window()
        if written != wanted:  # equal: an attempt's spec, which has been here before
            _check_exact(written, data["start"].get("job") or path)
        return {**data, "model": {**plain, **chosen}}

    @model_validator(mode="after")
    def _vocabulary_fits(self) -> ConvertConfig:
        tokenizer = self.data.tokenizer
        if tokenizer.path is None and tokenizer != TokenizerConfig():
            raise ValueError("the start's own tokenizer is read: leave data.tokenizer out, or give its path")
        return self

    @model_validator(mode="after")
    def _converts(self) -> ConvertConfig:
        if self.model == self.start_model:
            raise ValueError("the model is exact already: set attention to another kind")
        if self.model.moe is not None:
            raise ValueError("a mixture of experts can't be converted: give a dense model")
        return self

    @property
    def starts_from(self) -> StartConfig:
        """The exact model."""
        return self.start

    @property
    def start_model(self) -> ModelConfig:
        """The exact model's configuration."""
        return ModelConfig(**{**self.model.model_dump(), **EXACT})

    @property
    def context_tokens(self) -> int:
        """Tokens in a training sequence."""
        return self.training.context_tokens or min(CONTEXT_TOKENS, self.model.max_context_tokens)

    @property
    def transfer_steps(self) -> int:
        """The first steps, which fit attention's outputs."""
        return round(self.transfer_fraction * self.total_steps)


def _check_exact(attention: AttentionKind, start: str) -> None:
    if attention != KINDS.read({}):
        raise ValueError(f"{start} has attention {attention.kind}; only an exact model can be converted")


class AutoFeaturesConfig(ConvertConfig):
    """The `auto_features` workload: an exact model converted with features.count, twice that, ... until its gap to
    exact attention is within the tolerance (docs/theory A.8). Each count has a distillation of its own.
    """

    cost_note: ClassVar[str] = "of the first count; each doubling costs as much again, and its features more"

    tolerance_nats: float = Field(
        0.05, gt=0, description="held-out loss above the exact model's that is taken; 0.05: 5 % of perplexity"
    )
    max_count: int = Field(512, gt=0, description="the largest features.count that is tried")

    @model_validator(mode="before")
    @classmethod
    def _first_count(cls, data: Any) -> Any:
        """`features`: learned, FIRST_COUNT, where they don't say otherwise. Runs before `_convert`, which reads it."""
        written = data.get("features") if isinstance(data, dict) else None
        if not isinstance(data, dict) or not isinstance(written, dict | None):
            return data
        return {**data, "features": {"kind": "learned", "count": FIRST_COUNT, **(written or {})}}

    @model_validator(mode="after")
    def _doubles(self) -> AutoFeaturesConfig:
        if self.features is not None and self.features.count > self.max_count:
            raise ValueError(f"features.count {self.features.count} is above max_count {self.max_count}")
        return self

    @property
    def counts(self) -> list[int]:
        """What may be tried, in order."""
        found = [self.features.count if self.features else FIRST_COUNT]
        while 2 * found[-1] <= self.max_count:
            found.append(2 * found[-1])
        return found

    def with_count(self, count: int) -> ConvertConfig:
        """The conversion with `count` features."""
        plain = self.model_dump(include=set(ConvertConfig.model_fields))
        return ConvertConfig(**{**plain, "features": {**plain["features"], "count": count}})
