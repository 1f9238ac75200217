"""What a model is."""

from __future__ import annotations

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticKnownError

from escala.schema.attention import KINDS, AttentionSection, FeaturesConfig
from escala.schema.base import Strict
from escala.schema.moe import MoEConfig

MOST_PARAMETERS = 1e14


class ModelConfig(Strict):
    """A decoder-only transformer: RMSNorm, SwiGLU, RoPE, grouped-query heads (Llama's layout, Hugging Face's weights).

    Raises ValueError where heads do not divide, or head_dim is odd (RoPE turns pairs).
    """

    vocab_size: int = Field(4096, gt=0, description="tokens that there are; at least the tokenizer's")
    n_layers: int = Field(4, gt=0, description="blocks of attention and feed-forward")
    d_model: int = Field(256, gt=0, description="width of the residual stream")
    n_heads: int = Field(4, gt=0, description="query heads")
    n_kv_heads: int | None = Field(None, gt=0, description="None: n_heads")
    d_ff: int | None = Field(
        None, gt=0, description="SwiGLU width; None: 8/3 d_model, up to a multiple of 32"
    )
    max_context_tokens: int = Field(256, gt=0, description="the longest sequence that it reads")
    head_dim: int | None = Field(None, gt=0, description="None: d_model / n_heads")
    rope_base: float = Field(10_000.0, gt=0, description="of RoPE's wavelengths")
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square in RMSNorm")
    tie_embeddings: bool = Field(True, description="the unembedding is the embedding's transpose")
    qk_norm: bool = Field(False, description="RMSNorm on each head's query and key before RoPE (Qwen3)")
    attention: AttentionSection = Field(
        KINDS.read({}), description="a kind's name, or a section of kind and its options"
    )
    window_tokens: int | None = Field(
        None,
        gt=0,
        description="keys a query sees exactly, itself included; None: 256 where the attention has a window, else all",
    )
    features: FeaturesConfig | None = Field(
        None, description="of attention by features; None: positive, 256 where the attention has them"
    )
    moe: MoEConfig | None = Field(None, description="experts in place of feed-forward layers; None: dense")

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        defaults = {name: f.default for name, f in cls.model_fields.items()}
        d_model = data.get("d_model", defaults["d_model"])
        n_heads = data.get("n_heads", defaults["n_heads"])
        if not (isinstance(d_model, int) and isinstance(n_heads, int) and n_heads > 0):
            return data  # the field's own check reports it
        if data.get("n_kv_heads") is None:
            data["n_kv_heads"] = n_heads
        if data.get("head_dim") is None:
            if d_model % n_heads:
                raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}; set head_dim")
            data["head_dim"] = d_model // n_heads
        if data.get("d_ff") is None:
            data["d_ff"] = -(-8 * d_model // 3 // 32) * 32
        try:
            attention = KINDS.read(data.get("attention", {}))
        except (ValidationError, PydanticKnownError):
            return data  # likewise
        if data.get("window_tokens") is not None:
            attention = attention.with_window()
        for name, default in (("window_tokens", attention.window_tokens), ("features", attention.features)):
            if data.get(name) is None:
                data[name] = default
        return {**data, "attention": attention}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE turns pairs of channels")
        if self.moe is not None and self.moe.every > self.n_layers:
            raise ValueError(f"moe.every {self.moe.every} leaves no layer of {self.n_layers} with experts")
        if self._rough_parameters > MOST_PARAMETERS:
            raise ValueError(
                f"about {self._rough_parameters:.1g} parameters, more than the {MOST_PARAMETERS:g} that any machine "
                "trains: lower n_layers, d_model, d_ff, vocab_size or moe.experts"
            )
        self.attention.check(self)
        return self

    @property
    def _rough_parameters(self) -> float:
        """Matrices alone, every layer with all its experts: `escala.schema.flops.parameter_counts` counts exactly."""
        experts = 0 if self.moe is None else self.moe.experts + self.moe.shared_experts
        ff_width = max(self.ff_size, experts * self.expert_size)
        attention_width = 2 * (self.n_heads + self.kv_heads) * self.head_size
        return self.d_model * (self.vocab_size + self.n_layers * (3.0 * ff_width + attention_width))

    @property
    def kv_heads(self) -> int:
        """n_kv_heads, never None after validation."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        """head_dim, never None after validation."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def ff_size(self) -> int:
        """d_ff, never None after validation."""
        return self.d_ff or -(-8 * self.d_model // 3 // 32) * 32

    @property
    def expert_size(self) -> int:
        """SwiGLU width of one expert; 0 for a dense model."""
        return 0 if self.moe is None else self.moe.d_ff or self.ff_size

    @property
    def attention_words(self) -> str:
        """The kind of attention, its window and features, and its options that are not the default, e.g. `hybrid
        (window 256, 256 positive features)`: runs with the same words belong to one law.
        """
        options = self.attention.model_dump(exclude_defaults=True, exclude={"kind"})
        said = [] if self.window_tokens is None else [f"window {self.window_tokens}"]
        if self.features is not None:
            said.append(f"{self.features.count} {self.features.kind} features")
        said += [f"{key} {value}" for key, value in options.items()]
        return self.attention.kind + (f" ({', '.join(said)})" if said else "")

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer` (0, 1, ...) is a mixture of experts: the last of each `moe.every` is."""
        return self.moe is not None and (layer + 1) % self.moe.every == 0
