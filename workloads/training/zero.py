"""A DeepSpeed engine for any ZeRO stage, and access to its optimiser state one parameter at a time.

P ranks share the optimiser state (stage 1), the gradients too (2), and the parameters too (3): Rajbhandari et
al. 2020. One backward contract for all stages: a rank calls `backward(sum of losses * P / tokens of the
step)` for each micro-batch, DeepSpeed sums over micro-batches and averages over ranks, so that the gradient
is that of the mean loss over all tokens of the step, however they are split. Experts that the ranks share by
expert parallelism are not DeepSpeed's (see own_experts): here their clipping is joined to that of the rest.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from escala.schema import TrainingConfig
from workloads.model.weights import MASTER
from workloads.training.optimizer import adamw, parameter_groups
from workloads.training.own_experts import OwnExperts, empty_moments, take_shares

os.environ.setdefault(
    "DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu"
)  # read on first import
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """Whoever imports `module` meanwhile finds that it is not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # how Python says so
    try:
        yield
    finally:
        del sys.modules[module]


with _absent("mlflow"):  # DeepSpeed's autotuner, which is not used, takes half of the import for it
    import deepspeed
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import (
        numa,
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

# On CPUs ZeRO-3 asks at every reduction of gradients how many there are, for which DeepSpeed starts `numactl`.
numa.get_numa_cores = cache(numa.get_numa_cores)

EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
STATE_KEYS = (MASTER, EXP_AVG, EXP_AVG_SQ)
"""What a parameter's training state consists of, all in fp32: its master weight and Adam's two moments."""

MAX_BUCKET = 50_000_000  # elements of a reduce bucket; DeepSpeed's 5e8 would be 2 GB a rank in fp32


def deepspeed_config(
    training: TrainingConfig, micro_batch: int, micro_steps: int, parameters: int, clips: bool = True
) -> dict[str, Any]:
    """DeepSpeed's configuration for `training`; `parameters` bounds the buckets, `clips`: it clips gradients."""
    on_gpu = os.environ["DS_ACCELERATOR"] == "cuda"  # not is_available: a job on CPUs may see a GPU
    bucket = min(MAX_BUCKET, parameters)
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if training.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        if training.zero_param_persistence_threshold is not None:
            zero["stage3_param_persistence_threshold"] = training.zero_param_persistence_threshold
    if training.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    plain = training.zero_stage == 0 and training.precision == "fp32"
    clip_norm = training.optimizer.clip_norm if clips and not plain else None
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": clip_norm or 0.0,  # unset, it would be 1.0
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also when offloaded: nothing to compile
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    if training.precision == "bf16":
        config["bf16"] = {"enabled": True}
        if training.zero_stage:  # stage 0 has no fp32 gradient buffer: there micro-batches add up in bf16
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def make_engine(model: nn.Module, training: TrainingConfig, micro_batch: int, micro_steps: int) -> Any:
    """A DeepSpeed engine around `model`, on an initialised torch.distributed process group.

    The optimiser is torch's fused AdamW; its learning rate is set by `set_learning_rate` before each step.
    Rank 0's weights win: build the model under one seed everywhere, so that there is nothing to win. Experts
    of which `model` holds a share each rank keeps and optimises by itself.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile an all-reduce through shared memory (minutes of g++, no faster here), if a probe with
    # the compiler found it compatible. So there is nothing that it may compile, and nothing to probe.
    deepspeed.ops.__compatible_ops__ = {}
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it; Ray Train sets it
    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(),
        auto_mpi_discovery=False,
        verbose=False,
        dist_init_required=False,
    )
    make_adamw = partial(
        adamw, training.optimizer
    )  # its rate of 0: DeepSpeed's own first step (below) decays nothing
    shares = take_shares(model)
    optimizer = make_adamw(parameter_groups(model, training.optimizer.weight_decay))
    parameters = sum(p.numel() for p in model.parameters())
    config = deepspeed_config(training, micro_batch, micro_steps, parameters, clips=not shares)
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # its bf16 optimiser prints memory tables, whatever the log level
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # It creates Adam's state by a step without gradients, which would decay the weights (hence the rate
        # of 0) and count as the first update in the bias correction (hence this).
        engine.basic_optimizer.state.clear()
    engine.own_experts = OwnExperts(shares, engine.device, training, make_adamw) if shares else None
    if training.zero_stage == 0 and torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # with one rank it only copies all gradients there and back
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    """Set the learning rate of every parameter group for the next step."""
    own = engine.own_experts.optimizer if engine.own_experts else None
    for group in chain(engine.optimizer.param_groups, own.param_groups if own else ()):
        group["lr"] = value


def optimizer_step(engine: Any, training: TrainingConfig) -> float:
    """Clip and apply the accumulated gradient. Returns the global gradient norm before clipping, the same on
    all ranks.

    A norm that is not finite is returned as infinity; what the weights hold then must not be saved.
    """
    experts: OwnExperts | None = engine.own_experts
    if experts is None and not _is_plain(engine):
        engine.step()
        return _finite(engine.get_global_grad_norm())
    # DeepSpeed knows no norm at stage 0 in fp32, and never the experts': its own clipping is off, and gradients are
    # clipped as they reach its AdamW (a group at a time, at stages 1 and 2).
    limit, norm = training.optimizer.clip_norm or math.inf, math.inf
    elsewhere = 0.0 if experts is None else _finite(experts.finish_gradients())

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal norm
        tensors = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if _is_plain(engine):
            rest = float(nn.utils.get_total_norm([p.grad for p in tensors if p.grad is not None]))
        else:
            rest = engine.optimizer._global_grad_norm
        norm = math.hypot(_finite(rest), elsewhere)
        nn.utils.clip_grads_with_norm_(tensors, limit, torch.tensor(norm))

    hook = engine.basic_optimizer.register_step_pre_hook(clip)
    engine.step()
    hook.remove()
    if experts is not None and math.isfinite(norm):
        nn.utils.clip_grads_with_norm_(experts.masters.values(), limit, torch.tensor(norm))
        experts.step()
    return norm


def _finite(norm: Any) -> float:
    """The norm; infinity for what is not finite, for which DeepSpeed says -1."""
    found = float(norm)
    return found if math.isfinite(found) and found >= 0 else math.inf


def gathered(parameters: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """Whole within the context, where stage 3 has split them. A collective call."""
    split = [p for p in parameters if hasattr(p, "ds_id")]
    found: contextlib.AbstractContextManager[Any] = (
        deepspeed.zero.GatheredParameters(split) if split else contextlib.nullcontext()
    )
    return found


def parameters_held(engine: Any) -> int:
    """Elements of the model's parameters that this rank keeps between steps (ZeRO-3's share and persistent
    ones; its own experts).
    """
    own = engine.own_experts.numel if engine.own_experts else 0
    return own + sum(
        p.ds_tensor.numel() if hasattr(p, "ds_id") and not getattr(p, "ds_persist", False) else _full_numel(p)
        for p in engine.module.parameters()
    )


def parameter_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Name -> full shape of every trained parameter, in the model's order, shared experts last; a tied one once."""
    shapes = {
        name: tuple(p.ds_shape) if hasattr(p, "ds_id") else tuple(p.shape)
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }
    return shapes | (engine.own_experts.shapes() if engine.own_experts else {})


def adam_step(engine: Any) -> int:
    """Updates that the optimiser has made; 0 before the first."""
    states = [s for s in engine.basic_optimizer.state.values() if "step" in s]
    return int(states[0]["step"]) if states else 0


def link_state(engine: Any) -> None:
    """Let stages 1 and 2 find each parameter's moments; call it before gather_state.

    DeepSpeed links them after the first group's first update, when the second group has none yet.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def gather_state(engine: Any, name: str, key: str, owner: int) -> Tensor | None:
    """The full fp32 state `key` of parameter `name`, on rank `owner` as a CPU tensor; None on the others. A
    collective call.
    """
    if _is_own(engine, name):
        experts: OwnExperts = engine.own_experts
        return experts.gather(name, key, owner)
    param = engine.module.get_parameter(name)
    rank = torch.distributed.get_rank()
    shape = param.ds_shape if hasattr(param, "ds_id") else param.shape
    if _is_replicated(engine):
        return _replica(engine, param, key).detach().to("cpu", copy=True) if rank == owner else None
    buffer = torch.zeros(math.prod(shape), dtype=torch.float32, device=engine.device)
    fragment = _fragment(param, key)
    if fragment is not None:
        start, values = fragment
        stop = min(start + values.numel(), buffer.numel())  # stage 3 pads the last rank's part
        if stop > start:
            buffer[start:stop].copy_(values[: stop - start])
    # Summed as integers: every element is somebody's bits plus zeros, so nothing is rounded and -0.0 stays
    # -0.0.
    torch.distributed.reduce(buffer.view(torch.int32), dst=owner)
    return buffer.reshape(shape).cpu() if rank == owner else None


def begin_restore(engine: Any, adam_step: int) -> None:
    """Give the optimiser empty moments, which it would otherwise create at its first step."""
    for tensor in _optimized_tensors(engine):
        engine.basic_optimizer.state[tensor] = empty_moments(tensor, adam_step)
    link_state(engine)
    if engine.own_experts:
        engine.own_experts.begin_restore(adam_step)


def set_state(engine: Any, name: str, key: str, full: Tensor) -> None:
    """Write this rank's part of the full fp32 tensor `full` into state `key` of parameter `name`, and the
    weights it computes with.
    """
    if _is_own(engine, name):
        engine.own_experts.set(name, key, full)
        return
    param = engine.module.get_parameter(name)
    if _is_replicated(engine):
        _replica(engine, param, key).data.copy_(full)
    elif hasattr(param, "ds_id"):
        _set_stage3(param, key, full)
    else:
        fragment = _fragment(param, key)
        if fragment is not None:
            start, values = fragment
            values.data.copy_(full.flatten()[start : start + values.numel()])
    if key == MASTER and not hasattr(param, "ds_id"):
        param.data.copy_(full)


def end_restore(engine: Any) -> None:
    """Refresh what stage 3 computes with (its low-precision shares and persistent parameters) from the
    masters.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _is_own(engine: Any, name: str) -> bool:
    """Whether the parameter is of experts that the ranks share."""
    return engine.own_experts is not None and name in engine.own_experts.masters


def _is_plain(engine: Any) -> bool:
    """Stage 0 in fp32: the optimiser is torch's own."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _is_replicated(engine: Any) -> bool:
    """Stage 0: every rank holds everything."""
    return _is_plain(engine) or isinstance(engine.optimizer, FP16_UnfusedOptimizer)


def _full_numel(param: nn.Parameter) -> int:
    return int(getattr(param, "ds_numel", param.numel()))


def _optimized_tensors(engine: Any) -> Iterable[Tensor]:
    """The tensors that the base optimiser updates on this rank."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(optimizer.fp32_partitioned_groups_flat)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return list(optimizer.single_partition_of_fp32_groups)
    if isinstance(optimizer, BF16_Optimizer):
        return list(optimizer.fp32_groups_flat_partition)
    return [p for group in optimizer.param_groups for p in group["params"]]


def _replica(engine: Any, param: nn.Parameter, key: str) -> Tensor:
    """Stage 0: the whole state `key` of `param`."""
    master: Tensor = param
    if not _is_plain(engine):  # bf16: the masters stand beside the weights, in the same order
        optimizer = engine.optimizer
        low, full = chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups)
        master = next(fp32 for bf16, fp32 in zip(low, full, strict=True) if bf16 is param)
    return master if key == MASTER else engine.basic_optimizer.state[master][key]


def _fragment(param: Any, key: str) -> tuple[int, Tensor] | None:
    """This rank's part of state `key`: (offset in the flat parameter, values); None where it has none."""
    if hasattr(param, "ds_id"):
        local = (
            safe_get_local_fp32_param(param) if key == MASTER else safe_get_local_optimizer_state(param, key)
        )
        return torch.distributed.get_rank() * param.ds_tensor.numel(), local
    mapping = param._hp_mapping
    if mapping is None:
        return None
    values = mapping.get_hp_fragment(None if key == MASTER else key)
    return mapping.lp_fragment_address.start, values


def _set_stage3(param: Any, key: str, full: Tensor) -> None:
    """DeepSpeed's own setter for full tensors reads past their end when P does not divide them; hence the
    padding.
    """
    size = param.ds_tensor.numel()
    start = torch.distributed.get_rank() * size
    share = torch.zeros(size, dtype=torch.float32)
    values = full.flatten()[start : start + size]
    share[: values.numel()] = values
    if key == MASTER:
        safe_set_local_fp32_param(param, share)
    else:
        safe_set_local_optimizer_state(param, share, key)
