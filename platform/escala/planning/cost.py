"""What a run costs on a cluster, before it starts: memory, communication, time, energy, money. Pure.

Memory and communication follow what DeepSpeed does (docs/theory D.7; Rajbhandari et al. 2020), measured on CPU workers;
time is compute at the cluster's measured or stated speed plus the communication that nothing hides.
"""

from __future__ import annotations

from dataclasses import dataclass

from escala.contract.errors import SpecError
from escala.schema import ModelConfig, TrainedConfig
from escala.schema.flops import (
    chi,
    exchanged_elements_per_token,
    flops_per_token,
    mixture_layers,
    moved_bytes_per_step,
    parameter_counts,
    reference_parameters,
    saved_elements_per_token,
    shared_experts,
    trained_parameters,
    training_flops_per_token,
)
from escala.schema.hardware import Cluster, Device, Precision
from escala.schema.matrices import stored_base

FP32 = 4
MASTER_AND_MOMENTS = 3 * FP32  # bytes a parameter: fp32 master weight and Adam's two moments
MAX_BUCKET = 50_000_000  # elements of a reduce bucket, as workloads/training/zero.py bounds it
OPTIMIZER_BYTES = 28  # AdamW reads weight, gradient, two moments, and writes three of them, in fp32
LONG_CONTEXTS = (32_768, 131_072, 1_048_576)  # tokens: those whose memory a cost says beside the run's own
WHOLE_BYTES = (
    2 * FP32 + 1
)  # a weight of a matrix in codes that is made whole: its code, times the scale, plus the offset
LINK_UNKNOWN = "the device's link is not known: it was measured alone"
BUCKET_PASSES = 6  # reads and writes of a gradient on its way into a bucket, flat, scaled


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the step's fullest moment. `total` is less than the parts' sum where they do not meet."""

    weights: float  # what is kept, and under ZeRO-3 what is gathered
    gradients: float
    optimizer: float  # fp32 masters and Adam's moments
    buckets: float  # of the gradients' reduction
    activations: float
    runtime: float  # of the libraries, whatever the model
    total: float


@dataclass(frozen=True)
class Communication:
    """What one device sends in an optimiser step."""

    sent_bytes: float
    messages: int


@dataclass(frozen=True)
class ContextCost:
    """What one sequence of `context_tokens` takes with the run's model and kind of attention, in bytes on one device
    beside the model's states.
    """

    context_tokens: int
    chi: float  # of a token's cost, relative to one without attention
    activations: float  # of all blocks in a training step, and what one works on in its backward pass
    checkpointed: float  # of a block's input each, and of the one block that is computed again
    logits: float  # with their log-probabilities and gradient, in either case
    state: float  # in generation: keys and values, or what the kind keeps in their place


@dataclass(frozen=True)
class Cost:
    """A run's cost. Seconds are of optimiser steps alone, without start-up, evaluations and checkpoints. None: the
    cluster's file does not say what it takes to know.
    """

    n_total: int
    n_active: int
    train_tokens: int
    steps: int
    attention: str  # the kind
    chi: float  # attention's part: of a token's cost, relative to one without it
    compute_flops: float  # of the model; recomputation is not counted
    hardware_flops: float  # with it
    memory: Memory
    kv_cache_bytes_per_token: float  # by which generation's state of a long sequence grows; 0: it is constant
    contexts: tuple[ContextCost, ...]  # the run's own, then longer ones
    communication: Communication
    compute_seconds: float  # of one step
    exposed_seconds: float  # of one step: communication that nothing hides
    wall_seconds: float  # of all steps
    model_flops_utilization: float
    energy_joules: float | None  # at the meter, an estimate
    usd: float | None
    gco2e: float | None
    fits: bool  # in the device's memory
    notes: tuple[str, ...]

    @property
    def step_seconds(self) -> float:
        """Of one optimiser step."""
        return self.compute_seconds + self.exposed_seconds


def cost(config: TrainedConfig, cluster: Cluster) -> Cost:
    """What a run costs on `cluster`, its workers one device each. Raises SpecError where several workers
    ask for a link that was not measured.
    """
    counts = parameter_counts(config.model)
    per_token = flops_per_token(config.model, config.context_tokens)
    work = training_flops_per_token(config)
    memory, moved = memory_bytes(config, cluster.device), communication(config)
    compute, hidden = step_seconds(config, cluster.device)
    workers, steps = config.resources.workers, config.total_steps
    exposed = max(0.0, _sending_seconds(moved, cluster.device) - hidden)
    wall = steps * (compute + exposed)
    recomputed = per_token.total - per_token.logits if config.training.activation_checkpointing else 0.0
    hardware = (work + recomputed / 3) * config.train_tokens
    peak = _peak(cluster.device, config.training.precision)
    joules = energy_joules(config, cluster, hardware, wall)
    rates = cluster.rates()
    return Cost(
        n_total=counts.n_total,
        n_active=counts.n_active,
        train_tokens=config.train_tokens,
        steps=steps,
        attention=config.model.attention.kind,
        chi=chi(config.model, config.context_tokens),
        compute_flops=work * config.train_tokens,
        hardware_flops=hardware,
        memory=memory,
        kv_cache_bytes_per_token=kv_cache_bytes_per_token(config.model, _width(config)),
        contexts=tuple(
            context_cost(config, tokens)
            for tokens in (config.context_tokens, *LONG_CONTEXTS)
            if tokens >= config.context_tokens
        ),
        communication=moved,
        compute_seconds=compute,
        exposed_seconds=exposed,
        wall_seconds=wall,
        model_flops_utilization=work * config.step_tokens / workers / (compute + exposed) / peak,
        energy_joules=joules,
        usd=rates.usd(workers, wall),
        gco2e=rates.gco2e(joules),
        fits=memory.total <= cluster.device.memory_bytes.value,
        notes=_notes(config, cluster),
    )


def memory_bytes(config: TrainedConfig, device: Device) -> Memory:
    """Bytes on one device at the fullest moment of a step, by ZeRO stage (Rajbhandari et al. 2020, section 3).

    That moment is the reduction of a full bucket of gradients. Freed activations and gathered parameters still belong
    to the process then: glibc's heap keeps them (a CUDA device's cache does, too). With activation checkpointing
    workers set their heap to give back, and what the backward pass has used is gone. Of experts that workers share each
    has its part, with gradients and optimiser; they pass through no bucket. Of LoRA's base in codes each has all, and
    one matrix made whole.
    """
    training, stage = config.training, config.training.zero_stage
    ranks, n, width = config.resources.workers, parameter_counts(config.model).n_total, _width(config)
    is_mixed, trained = training.precision == "bf16", trained_parameters(config)
    experts, trained_experts = shared_experts(config)
    base = stored_base(config)
    n, trained = n - experts - base.parameters, trained - trained_experts
    bucket = min(MAX_BUCKET, trained)
    gathered = n * width if stage == 3 else 0
    weights = n * width / (ranks if stage == 3 else 1) + gathered + reference_parameters(config) * width
    gradients = trained * (FP32 if stage else width) / (ranks if stage >= 2 else 1)
    own_masters = MASTER_AND_MOMENTS if is_mixed else MASTER_AND_MOMENTS - FP32  # in fp32 the weights are
    masters = MASTER_AND_MOMENTS if stage else own_masters
    optimizer = trained * masters / (ranks if stage else 1)
    weights += experts / ranks * width + base.stored_bytes + base.largest * WHOLE_BYTES
    gradients += trained_experts / ranks * FP32
    optimizer += trained_experts / ranks * own_masters
    optimizer = 0.0 if training.offload == "cpu" else optimizer
    buckets = bucket * _bucket_bytes(stage, width, ranks)
    tokens = config.micro_batch_sequences * config.context_tokens
    kept, working, head = activation_bytes(config, tokens, training.activation_checkpointing)
    again = working if training.activation_checkpointing else 0.0
    activations = kept + again + working + head
    runtime = 0.0 if device.runtime_bytes is None else device.runtime_bytes.value
    fixed = weights + gradients + optimizer + runtime
    total = fixed + buckets + activations
    if training.activation_checkpointing:
        begins = fixed + bucket * width + activations - again - working
        reduces = fixed - gathered * bucket / trained + buckets + again + working
        total = max(begins, reduces)
    elif is_mixed and stage == 0:  # the update makes an fp32 copy of all gradients, when activations are gone
        total = max(total, fixed + trained * FP32)
    return Memory(weights, gradients, optimizer, buckets, activations, runtime, total)


def _bucket_bytes(stage: int, width: int, ranks: int) -> int:
    """Bytes an element of a bucket of gradients, with the copies that its reduction makes: the flat tensor and the
    collective's own (stage 3; elsewhere one), and in bf16 the cast to fp32.
    """
    if stage == 0:
        return FP32 if ranks > 1 else 0
    copies = (2 if stage == 3 and ranks > 1 else 1) + (width < FP32)
    own = 0 if stage == 1 and width < FP32 else width  # DeepSpeed's BF16_Optimizer has no bucket of its own
    return own + copies * FP32


def activation_bytes(config: TrainedConfig, tokens: int, checkpointing: bool) -> tuple[float, float, float]:
    """Of `tokens` tokens: what all blocks keep for the backward pass, what one block's gradients take there, the logits
    (in fp32, with log-probabilities and gradient). Attention's part is its kind's (docs/theory D.7).
    """
    width = _width(config)
    saved = saved_elements_per_token(config.model, checkpointing, width)
    exchanged = exchanged_elements_per_token(config.model) if shared_experts(config)[0] else 0.0
    kept = 0.0 if checkpointing else exchanged * mixture_layers(config.model)
    blocks, working = tokens * (saved.blocks + kept) * width, tokens * (saved.working + exchanged) * width
    return blocks, working, tokens * saved.head * FP32


def context_cost(config: TrainedConfig, context_tokens: int) -> ContextCost:
    """What a sequence of that many tokens takes, whether or not the run has such."""
    *plain, logits = activation_bytes(config, context_tokens, False)
    inputs, working, _ = activation_bytes(config, context_tokens, True)
    return ContextCost(
        context_tokens=context_tokens,
        chi=chi(config.model, context_tokens),
        activations=sum(plain),
        checkpointed=inputs + 2 * working,  # its activations again, and their gradients
        logits=logits,
        state=state_bytes(config.model, context_tokens, _width(config)),
    )


def state_bytes(model: ModelConfig, tokens: int, width: int) -> float:
    """What generation keeps of a sequence of `tokens` tokens in all layers, `width` bytes an element."""
    return float(model.attention.state_elements(model, tokens, width) * width)


def kv_cache_bytes_per_token(model: ModelConfig, width: int) -> float:
    """What generation keeps of each further token of a long sequence in all layers, `width` bytes an element: keys and
    values of exact attention, landmarks of nystrom's, nothing where the state is constant.
    """
    long = LONG_CONTEXTS[-1]
    return (state_bytes(model, 2 * long, width) - state_bytes(model, long, width)) / long


def communication(config: TrainedConfig) -> Communication:
    """What a rank sends in an optimiser step (docs/theory D.7; counted by workloads/training/traffic.py on real runs).

    Stage 3: per micro-batch two gathers of the parameters and one reduce-scatter of the gradients; checkpointing
    refetches nothing while all parameters fit among DeepSpeed's live ones. Stage 2 all-reduces (two passes) per
    micro-batch, stages 0 and 1 once a step; 1 and 2 gather the updated parameters. Gradients travel in fp32. Of experts
    that workers share neither gradients nor weights travel, but tokens' states; of LoRA's base in codes nothing does.
    """
    ranks, stage, model = config.resources.workers, config.training.zero_stage, config.model
    if ranks == 1:
        return Communication(0.0, 0)
    n, width = parameter_counts(model).n_total - stored_base(config).parameters, _width(config)
    trained = trained_parameters(config) - shared_experts(config)[1]
    micro_steps = config.training.batch_sequences // (ranks * config.micro_batch_sequences)
    buckets = -(-trained // min(MAX_BUCKET, trained))
    gather, reduce = (n if stage == 3 else trained) * width, trained * FP32
    if stage == 3:
        volume = micro_steps * (2 * gather + reduce)
        messages = micro_steps * (2 * (_matrices(model) + 1) + buckets)  # a gather a matrix
    else:
        reductions = micro_steps if stage == 2 else 1
        volume = 2 * reduce * reductions + (gather if stage else 0)
        messages = buckets * (reductions + (1 if stage else 0))
    rows, exchanges = _exchanged(config)
    moved = volume + rows * model.d_model * width
    return Communication(moved * (ranks - 1) / ranks, messages + exchanges)


def _exchanged(config: TrainedConfig) -> tuple[float, int]:
    """Rows of a rank's states in an optimiser step's all-to-alls, and how many of these: with expert parallelism each
    choice goes to its expert's rank and back, and so does its gradient; the sizes go first. Checkpointing makes the
    forward pass's again.
    """
    moe = config.model.moe
    if moe is None or not shared_experts(config)[0]:
        return 0.0, 0
    layers, ranks = mixture_layers(config.model), config.resources.workers
    choices = moe.trained_experts * min(1.0, moe.capacity_factor or 1.0)
    micro_steps = config.training.batch_sequences // (ranks * config.micro_batch_sequences)
    forward = 2 if config.training.activation_checkpointing else 1
    rows = (2 * forward + 2) * layers * choices * config.step_tokens / ranks
    return rows, (3 * forward + 2) * layers * micro_steps


def _matrices(model: ModelConfig) -> int:
    """Weight tensors of the blocks: four of attention and three of a feed-forward, or of all experts together, with the
    router and three of the shared ones.
    """
    more = 0 if model.moe is None else 1 + 3 * (model.moe.shared_experts > 0)
    return int(7 * model.n_layers + more * mixture_layers(model))


def step_seconds(config: TrainedConfig, device: Device) -> tuple[float, float]:
    """Compute of one optimiser step on one device, and how much of the communication it can hide: DeepSpeed overlaps
    them on GPUs (`overlap_comm`), not on CPUs.
    """
    training, ranks = config.training, config.resources.workers
    trained_experts = shared_experts(config)[1]
    trained = trained_parameters(config) - trained_experts
    per_token = flops_per_token(config.model, config.context_tokens)
    tokens = config.step_tokens / ranks
    blocks = (per_token.matmul + per_token.attention) * tokens
    speed = (device.training or {}).get(training.precision)
    slowed = 1.0
    if speed is None:
        reached = _peak(device, training.precision) * utilization(device)
        recomputed = blocks / 3 if training.activation_checkpointing else 0.0
        work = (blocks + recomputed + per_token.logits * tokens) / reached
    else:
        width = config.model.d_model
        work = blocks / speed.block_at(width) + per_token.logits * tokens / speed.head
        if training.activation_checkpointing:
            work += blocks / 3 / speed.recompute_at(width)
        work /= speed.alone if ranks == 1 else 1.0
        slowed = 1.0 if ranks == 1 else 1 / speed.efficiency_at(training.zero_stage)
    work *= training_flops_per_token(config) / per_token.total
    mine = (trained / ranks if training.zero_stage else trained) + trained_experts / ranks
    bandwidth = device.memory_bytes_per_second.value
    if device.optimizer_parameters_per_second is None:
        update = mine * OPTIMIZER_BYTES / bandwidth
    else:
        update = mine / device.optimizer_parameters_per_second.value
    micro_steps = training.batch_sequences // (ranks * config.micro_batch_sequences)
    copies = micro_steps * BUCKET_PASSES * FP32 * trained / bandwidth if training.zero_stage else 0.0
    hidden = work if config.resources.gpus_per_worker else 0.0
    return slowed * (work + update + copies), hidden


def _sending_seconds(moved: Communication, device: Device) -> float:
    bandwidth, latency = device.link_bytes_per_second, device.link_seconds
    if not moved.messages:
        return 0.0
    if bandwidth is None or latency is None:
        raise SpecError(
            LINK_UNKNOWN,
            "escala bench device --workers N, or write link_bytes_per_second and link_seconds into the file",
        )
    return moved.sent_bytes / bandwidth.value + moved.messages * latency.value


def has_link(device: Device) -> bool:
    """Whether the file says how fast devices send: several workers need that."""
    return device.link_bytes_per_second is not None and device.link_seconds is not None


def energy_joules(
    config: TrainedConfig, cluster: Cluster, hardware_flops: float, seconds: float
) -> float | None:
    """At the meter: static + dynamic + memory traffic (docs/theory E.1), by the device's stated coefficients; None
    where they are not all stated.
    """
    rates = cluster.rates()
    moved = moved_bytes_per_step(config) * config.total_steps
    return rates.joules(config.resources.workers, seconds, hardware_flops, moved)


def _width(config: TrainedConfig) -> int:
    """Bytes of a parameter in compute."""
    return 2 if config.training.precision == "bf16" else FP32


def _peak(device: Device, precision: Precision) -> float:
    peaks = device.peak_flops_per_second
    return (peaks.get(precision) or next(iter(peaks.values()))).value


def utilization(device: Device) -> float:
    return device.utilization.value if device.utilization is not None else 1.0


def _notes(config: TrainedConfig, cluster: Cluster) -> tuple[str, ...]:
    device, precision = cluster.device, config.training.precision
    notes = [f"the device was {device.measured}: {device.about}"]
    if precision not in device.peak_flops_per_second:
        notes.append(
            f"{precision} is not in the device's figures; taken as {next(iter(device.peak_flops_per_second))}"
        )
    if config.cost_note:
        notes.append(config.cost_note)
    if config.resources.workers > cluster.devices:
        notes.append(f"{config.resources.workers} workers; the cluster has {cluster.devices} devices")
    if device.training is None and device.utilization is not None:
        notes.append(f"time at {device.utilization.value:.0%} of peak ({device.utilization.source})")
    return tuple(notes)
