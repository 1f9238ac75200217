"""How a model is trained, and on what."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from escala.schema.base import StoredPath, Strict
from escala.schema.compression import QuantizationConfig
from escala.schema.model import ModelConfig
from escala.schema.moe import ExpertKernel


class OptimizerConfig(Strict):
    """AdamW, and a learning rate that warms up, then decays to `final_fraction` of its peak."""

    learning_rate: float = Field(3e-3, gt=0, description="peak, after the warm-up")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine",
        description="after the warm-up: cosine falls at once, wsd stays and falls in its last steps, constant stays",
    )
    warmup_steps: int | None = Field(None, ge=0, description="None: 5 % of the steps, at most 500")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: the share of steps that decay linearly")
    final_fraction: float = Field(0.1, ge=0, le=1, description="of the peak, at the run's end (cosine, wsd)")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    eps: float = Field(1e-8, gt=0, description="added to the root of the mean square")
    weight_decay: float = Field(0.1, ge=0, description="on matrices only: norms and biases are not decayed")
    clip_norm: float | None = Field(1.0, gt=0, description="global gradient norm; None: no clipping")

    def decay_start(self, total_steps: int, warmup_steps: int) -> int:
        """The step (0, 1, ...) from which on the rate falls: the last one at the peak. Up to it, all runs of one peak
        and warm-up under wsd are the same run; cosine falls from the end of the warm-up, constant never.
        """
        if self.schedule == "constant":
            return total_steps
        if self.schedule == "cosine":
            return warmup_steps
        return max(warmup_steps, total_steps - 1 - round(self.decay_fraction * total_steps))


class TrainingConfig(Strict):
    """How long, how wide and how precisely. Batches are counted over all workers."""

    steps: int | None = Field(None, gt=0, description="optimiser steps; None without train_tokens: 100")
    train_tokens: int | None = Field(None, gt=0, description="instead of steps; rounded up to whole steps")
    context_tokens: int | None = Field(None, gt=0, description="None: the model's max_context_tokens")
    batch_sequences: int = Field(16, gt=0, description="sequences in one optimiser step, over all workers")
    micro_batch_sequences: int | None = Field(None, gt=0, description="per worker; None: batch / workers")
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the forward and backward pass; the optimiser's weights and states are fp32",
    )
    matmul_precision: Literal["auto", "highest"] = Field(
        "auto",
        description="auto: torch's 'medium' where a start-up check shows that it keeps fp32 error and is far faster",
    )
    expert_kernel: ExpertKernel | None = Field(
        None,
        description="how a mixture's products are made: slices one an expert, padded all experts in one batch, runs "
        "experts in a row where that pays; None: the fastest here, measured for a second, kept over resumes",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        3,
        description="what workers share out: 0 nothing, 1 optimiser states, 2 gradients too, 3 parameters too",
    )
    zero_param_persistence_threshold: int | None = Field(
        None,
        ge=0,
        description="parameters smaller than this stay whole on every rank; None: DeepSpeed's default",
    )
    offload: Literal["none", "cpu"] = Field("none", description="ZeRO optimiser states in host memory (GPU)")
    activation_checkpointing: bool = Field(
        False, description="keep each block's input alone and compute the rest again in the backward pass"
    )
    seed: int = Field(
        0, ge=0, description="of all that is drawn: weights, order of the data, dropout, responses"
    )
    evaluate_every_steps: int | None = Field(None, gt=0, description="None: only before and after")
    spectrum_every_steps: int | None = Field(
        None,
        gt=0,
        description="steps between two looks at what the matrices hold: entropy, stable rank, truncation; None: none",
    )
    evaluation_tokens: int = Field(65_536, gt=0, description="held-out tokens, at most")
    checkpoint_every_steps: int | None = Field(
        None,
        ge=0,
        description="None: every tenth of the run, and at its end; 0: only where the run is stopped",
    )
    keep_checkpoints: int = Field(2, gt=0, description="newest ones; older ones go")
    log_every_steps: int = Field(1, gt=0, description="between two points of the metrics")

    @model_validator(mode="after")
    def _length(self) -> TrainingConfig:
        if self.steps is not None and self.train_tokens is not None:
            raise ValueError("give steps or train_tokens, not both")
        return self


class ResourcesConfig(Strict):
    """What each Ray Train worker gets. Data-parallel ranks = workers."""

    workers: int = Field(1, gt=0, description="processes that train; the batch is divided among them")
    cpus_per_worker: float = Field(1, gt=0, description="logical CPUs that Ray reserves for each")
    gpus_per_worker: int = Field(0, ge=0, le=1, description="one GPU a worker")
    threads_per_worker: int = Field(
        1, gt=0, description="OMP_NUM_THREADS: more than the cores costs up to 10x"
    )


class StartConfig(Strict):
    """The model that a run starts from: a path, or a job of this home, whose newest good checkpoint it is."""

    path: StoredPath | None = Field(
        None,
        description="a directory of safetensors in Hugging Face's layout, a .gguf file, or a job's checkpoints",
    )
    job: str | None = Field(None, description="a job's id or name; `submit` writes its checkpoints into path")

    @model_validator(mode="after")
    def _one(self) -> StartConfig:
        if self.path is None and self.job is None:
            raise ValueError("give path or job")
        return self


class LoraConfig(Strict):
    """Low-rank deltas of frozen matrices (Hu et al. 2022): W + alpha / rank * B A."""

    rank: int = Field(8, gt=0, description="of each delta")
    alpha: float = Field(16.0, gt=0, description="the deltas are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the deltas' input, in training")
    targets: list[Literal["query", "key", "value", "output", "gate", "up", "down"]] = Field(
        ["query", "value"], min_length=1, description="matrices of every block"
    )
    base: Literal["fp32", "int8", "int4"] = Field(
        "fp32",
        description="how the frozen matrices of all blocks are stored, targets or not; deltas and optimiser: fp32",
    )
    quantization: QuantizationConfig = Field(
        QuantizationConfig(), description="of a base in int8 or int4; without calibration"
    )

    @model_validator(mode="after")
    def _base(self) -> LoraConfig:
        if self.base == "fp32" and self.quantization != QuantizationConfig():
            raise ValueError("quantization is of a base in int8 or int4: set base, or leave quantization out")
        if self.quantization.calibration is not None:
            raise ValueError(
                "quantization.calibration: a checkpoint holds the deltas alone, and its base must be the same again "
                "whatever became of that text; leave it out"
            )
        return self


class TrainedConfig(Strict):
    """What every workload that trains a model shares: the model, the run's length and width, the workers.

    What planning and the FLOPs of a step depend on is here, so that they ask no configuration for its class:
    `keeps_reference`: a frozen copy of the start stands beside the trained model (with LoRA the model without its
    deltas serves). `forward_passes`: of the model that it starts from over each token, beside those of training.
    `trains_attention_alone`: all other weights stay the start's, and no checkpoint holds them. `cost_note`: what an
    estimate of the run's cost leaves out.
    """

    keeps_reference: ClassVar[bool] = False
    forward_passes: ClassVar[int] = 0
    trains_attention_alone: ClassVar[bool] = False
    cost_note: ClassVar[str] = ""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _fits(self) -> TrainedConfig:
        if self.context_tokens > self.model.max_context_tokens:
            raise ValueError(
                f"training.context_tokens {self.context_tokens} is longer than "
                f"model.max_context_tokens {self.model.max_context_tokens}"
            )
        self.check_workers()
        if self.model.moe is None and self.training.expert_kernel is not None:
            raise ValueError("training.expert_kernel has no use: the model is no mixture of experts")
        return self

    def check_workers(self) -> None:
        """Raise ValueError where the workers cannot share the batch, or the experts."""
        ranks = self.resources.workers
        if self.training.batch_sequences % (ranks * self.micro_batch_sequences):
            raise ValueError(
                f"training.batch_sequences {self.training.batch_sequences} is not a multiple of "
                f"workers {ranks} x micro_batch_sequences {self.micro_batch_sequences}"
            )
        if self.model.moe is not None:
            self.model.moe.check_workers(ranks, self.training.zero_stage)

    def with_workers(self, workers: int) -> Self:
        """The same run on so many workers. Raises ValueError as `check_workers`."""
        resources = self.resources.model_copy(update={"workers": workers})
        changed = self.model_copy(update={"resources": resources})
        changed.check_workers()
        return changed

    @property
    def starts_from(self) -> StartConfig | None:
        """The model that the run starts from; None: weights drawn at random."""
        return None

    @property
    def start_model(self) -> ModelConfig:
        """What the start is: the model's own configuration, but where the run converts it."""
        return self.model

    @property
    def transfer_steps(self) -> int:
        """The first steps that fit attention's outputs to those of the start; 0: none do."""
        return 0

    @property
    def adapter(self) -> LoraConfig | None:
        """The deltas that are trained; None: all weights are."""
        return None

    @property
    def critic_model(self) -> ModelConfig | None:
        """The transformer of a critic that is trained beside the model; None: there is none."""
        return None

    @property
    def epochs(self) -> int:
        """Times that a step learns from each token of its batch."""
        return 1

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
    def decay_start_step(self) -> int:
        """The step from which on the learning rate falls."""
        return self.training.optimizer.decay_start(self.total_steps, self.warmup_steps)

    @property
    def checkpoint_every_steps(self) -> int:
        """Steps between two checkpoints; 0: none."""
        stated = self.training.checkpoint_every_steps
        return max(1, self.total_steps // 10) if stated is None else stated
