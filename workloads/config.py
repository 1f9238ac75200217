"""What a user may write about a workload, validated: pydantic and the standard library only.

The control plane reads these classes to check a spec before anything starts; the workload reads the same ones on
the cluster. Unknown keys fail. A field that is None is derived by the validator of its own class, and only there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Unknown keys fail; values are frozen once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


StoredPath = Annotated[str, AfterValidator(_absolute)]
"""A path as the user typed it, made absolute where it was typed: the driver runs in another directory."""


class ModelConfig(Strict):
    """A decoder-only transformer: RMSNorm, SwiGLU, RoPE, grouped-query heads (Llama's layout, Hugging Face's weights).

    Raises ValueError where heads do not divide, or head_dim is odd (RoPE turns pairs).
    """

    vocab_size: int = Field(4096, gt=0)
    n_layers: int = Field(4, gt=0)
    d_model: int = Field(256, gt=0)
    n_heads: int = Field(4, gt=0)
    n_kv_heads: int | None = Field(None, gt=0, description="None: n_heads")
    d_ff: int | None = Field(
        None, gt=0, description="SwiGLU width; None: 8/3 d_model, up to a multiple of 32"
    )
    max_context_tokens: int = Field(256, gt=0)
    head_dim: int | None = Field(None, gt=0, description="None: d_model / n_heads")
    rope_base: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-6, gt=0)
    tie_embeddings: bool = True
    qk_norm: bool = Field(False, description="RMSNorm on each head's query and key before RoPE (Qwen3)")
    attention: Literal["exact"] = "exact"
    window_tokens: int | None = Field(None, gt=0, description="keys a query sees, itself included; None: all")

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
        return data

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE turns pairs of channels")
        return self

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


class TokenizerConfig(Strict):
    """Byte-level BPE trained on the corpus's training split, or a tokenizer.json given."""

    path: StoredPath | None = Field(None, description="a tokenizer.json; None: train one")
    vocab_size: int = Field(4096, ge=258, description="of the one to train")
    train_characters: int = Field(10_000_000, gt=0, description="how much of the corpus the training sees")


class PythonSourceCorpus(Strict):
    """The Python standard library and a fixed list of core dependencies, whose versions are checked."""

    kind: Literal["python_source"] = "python_source"
    packages: list[str] | None = Field(None, description="a subset of the fixed list; None: all of it")
    weight: float = Field(1.0, gt=0)


class FilesCorpus(Strict):
    """Text files by globs inside a stated root; one document a file."""

    kind: Literal["files"]
    root: StoredPath
    globs: list[str] = Field(["**/*.txt"], min_length=1)
    weight: float = Field(1.0, gt=0)


class JsonlCorpus(Strict):
    """JSON lines; one document a line."""

    kind: Literal["jsonl"]
    path: StoredPath
    text_key: str = "text"
    weight: float = Field(1.0, gt=0)


class HuggingFaceCorpus(Strict):
    """A data set of the Hugging Face hub by name; needs `datasets` and, the first time, the network."""

    kind: Literal["huggingface"]
    name: str
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"
    revision: str | None = Field(None, description="a commit; recorded, so that the run can be repeated")
    weight: float = Field(1.0, gt=0)


Corpus = Annotated[
    PythonSourceCorpus | FilesCorpus | JsonlCorpus | HuggingFaceCorpus, Field(discriminator="kind")
]


class DataConfig(Strict):
    """Where the tokens come from. With several corpora, each sequence is drawn from one of them by weight."""

    corpora: list[Corpus] = Field([PythonSourceCorpus()], min_length=1)
    tokenizer: TokenizerConfig = TokenizerConfig()
    held_out_fraction: float = Field(0.02, gt=0, lt=0.5, description="of documents, by hash of their content")
    max_characters: int | None = Field(None, gt=0, description="stop reading the corpus after so many")
    allow_repeats: bool = Field(True, description="False: refuse a run longer than one epoch of the data")


class OptimizerConfig(Strict):
    """AdamW, and a learning rate that warms up, then decays to `final_fraction` of its peak."""

    learning_rate: float = Field(3e-3, gt=0)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int | None = Field(None, ge=0, description="None: 5 % of the steps, at most 500")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: the share of steps that decay linearly")
    final_fraction: float = Field(0.1, ge=0, le=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices only: norms and biases are not decayed")
    clip_norm: float | None = Field(1.0, gt=0, description="global gradient norm; None: no clipping")


class TrainingConfig(Strict):
    """How long, how wide and how precisely. Batches are counted over all workers."""

    steps: int | None = Field(None, gt=0, description="optimiser steps; None without train_tokens: 100")
    train_tokens: int | None = Field(None, gt=0, description="instead of steps; rounded up to whole steps")
    context_tokens: int | None = Field(None, gt=0, description="None: the model's max_context_tokens")
    batch_sequences: int = Field(16, gt=0, description="sequences in one optimiser step, over all workers")
    micro_batch_sequences: int | None = Field(None, gt=0, description="per worker; None: batch / workers")
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    matmul_precision: Literal["auto", "highest"] = Field(
        "auto",
        description="auto: torch's 'medium' where a start-up check shows that it keeps fp32 error",
    )
    zero_stage: Literal[0, 1, 2, 3] = 3
    zero_param_persistence_threshold: int | None = Field(
        None,
        ge=0,
        description="parameters smaller than this stay whole on every rank; None: DeepSpeed's default",
    )
    offload: Literal["none", "cpu"] = Field("none", description="ZeRO optimiser states in host memory (GPU)")
    activation_checkpointing: bool = False
    seed: int = Field(0, ge=0)
    evaluate_every_steps: int | None = Field(None, gt=0, description="None: only before and after")
    evaluation_tokens: int = Field(65_536, gt=0, description="held-out tokens, at most")
    checkpoint_every_steps: int | None = Field(
        None,
        ge=0,
        description="None: every tenth of the run, and at its end; 0: only where the run is stopped",
    )
    keep_checkpoints: int = Field(2, gt=0)
    log_every_steps: int = Field(1, gt=0)

    @model_validator(mode="after")
    def _length(self) -> TrainingConfig:
        if self.steps is not None and self.train_tokens is not None:
            raise ValueError("give steps or train_tokens, not both")
        return self


class ResourcesConfig(Strict):
    """What each Ray Train worker gets. Data-parallel ranks = workers."""

    workers: int = Field(1, gt=0)
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: int = Field(0, ge=0, le=1, description="one GPU a worker")
    threads_per_worker: int = Field(
        1, gt=0, description="OMP_NUM_THREADS: more than the cores costs up to 10x"
    )


class PretrainConfig(Strict):
    """The `pretrain` workload."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _fits(self) -> PretrainConfig:
        if self.context_tokens > self.model.max_context_tokens:
            raise ValueError(
                f"training.context_tokens {self.context_tokens} is longer than "
                f"model.max_context_tokens {self.model.max_context_tokens}"
            )
        ranks = self.resources.workers
        if self.training.batch_sequences % (ranks * self.micro_batch_sequences):
            raise ValueError(
                f"training.batch_sequences {self.training.batch_sequences} is not a multiple of "
                f"workers {ranks} x micro_batch_sequences {self.micro_batch_sequences}"
            )
        if self.data.tokenizer.path is None and self.data.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size {self.data.tokenizer.vocab_size} does not fit "
                f"model.vocab_size {self.model.vocab_size}"
            )
        return self

    @property
    def context_tokens(self) -> int:
        """Tokens in a training sequence."""
        return self.training.context_tokens or self.model.max_context_tokens

    @property
    def micro_batch_sequences(self) -> int:
        """Sequences in one forward pass of one worker."""
        return self.training.micro_batch_sequences or max(
            1, self.training.batch_sequences // self.resources.workers
        )

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimiser step, over all workers."""
        return self.training.batch_sequences * self.context_tokens

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.training.train_tokens is None:
            return self.training.steps or 100
        return -(-self.training.train_tokens // self.step_tokens)

    @property
    def train_tokens(self) -> int:
        """Tokens that the whole run trains on (D)."""
        return self.total_steps * self.step_tokens

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        stated = self.training.optimizer.warmup_steps
        return min(500, self.total_steps // 20) if stated is None else stated

    @property
    def checkpoint_every_steps(self) -> int:
        """Steps between two checkpoints; 0: none."""
        stated = self.training.checkpoint_every_steps
        return max(1, self.total_steps // 10) if stated is None else stated


class BenchConfig(Strict):
    """The `bench` workload: what it measures on every worker at once."""

    widths: list[int] = Field([256, 512, 1024], min_length=1, description="d_model of the blocks")
    tokens: int = Field(512, gt=0, description="of a micro-batch")
    context_tokens: int = Field(256, gt=0)
    vocab_size: int = Field(4096, gt=0)
    precisions: list[Literal["fp32", "bf16"]] = Field(["fp32", "bf16"], min_length=1)
    seconds: float = Field(3.0, gt=0, description="for each figure")
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _whole(self) -> BenchConfig:
        if self.tokens % self.context_tokens:
            raise ValueError(f"tokens {self.tokens} are no whole sequences of {self.context_tokens}")
        return self


WORKLOADS: dict[str, tuple[str, type[Strict]]] = {
    "pretrain": ("workloads.pretrain", PretrainConfig),
}
"""Name that a user types -> (module that the cluster runs, class that checks its configuration)."""
