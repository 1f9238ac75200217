"""The experts that one rank holds for all (`moe.expert_parallel`), outside of DeepSpeed: weights, gradients and AdamW.

DeepSpeed would copy rank 0's experts over the others' and average the gradients of different ones; its own expert
groups take another norm for the clipping, the mean of the ranks' expert norms. So it never sees them: `take_shares`
makes them plain tensors of their modules, no parameters. There is nothing to reduce or to gather either: the all-to-all
brings the gradients of all ranks' tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from escala.schema import TrainingConfig
from workloads.model.experts import STACKS, Experts


def take_shares(model: nn.Module) -> dict[str, tuple[Experts, str]]:
    """Take the stacks of shared experts from `model`'s parameters; returns each parameter's name -> its place. Their
    modules keep them as plain tensors.
    """
    places = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Experts) and module.is_share:
            for stack in STACKS:
                weight = getattr(module, stack)
                delattr(module, stack)
                setattr(module, stack, weight.detach().requires_grad_(weight.requires_grad))
                places[f"{prefix}.{stack}"] = (module, stack)
    return places


class OwnExperts:
    """A rank's E/P experts in training. Frozen ones (LoRA's) have weights alone.

    Attributes:
        weights: parameter name -> what the rank computes with, (E/P, ...).
        masters: name of a trained parameter -> its fp32 weight; the same tensor where the precision is fp32.
        optimizer: AdamW of the masters; None where nothing is trained.
    """

    def __init__(
        self,
        places: dict[str, tuple[Experts, str]],
        device: torch.device,
        training: TrainingConfig,
        adamw: Callable[..., torch.optim.AdamW],
    ) -> None:
        self.ranks = torch.distributed.get_world_size()
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        home = torch.device("cpu") if training.offload == "cpu" else device  # of masters and moments
        self.weights, self.masters = {}, {}
        for name, (module, stack) in places.items():
            drawn: Tensor = getattr(module, stack)
            weight = drawn.detach().to(device, dtype).requires_grad_(drawn.requires_grad)
            setattr(module, stack, weight)
            self.weights[name] = weight
            if not weight.requires_grad:
                continue
            self.masters[name] = weight
            if (dtype, home) != (torch.float32, device):
                self.masters[name] = drawn.detach().to(home, torch.float32, copy=True).requires_grad_()
                hook = _adds_to(self.masters[name])
                # torch annotates its decorator of this method, and not the method.
                weight.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        decay = training.optimizer.weight_decay
        groups = [{"params": list(self.masters.values()), "weight_decay": decay}]
        self.optimizer = adamw(groups) if self.masters else None

    @property
    def numel(self) -> int:
        """Elements of the weights on this rank."""
        return sum(weight.numel() for weight in self.weights.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the whole stack (E, ...), of every trained parameter."""
        return {name: (m.shape[0] * self.ranks, *m.shape[1:]) for name, m in self.masters.items()}

    def finish_gradients(self) -> float:
        """Scale the gradients to those of the step's mean loss, as DeepSpeed does by averaging over the ranks; returns
        their norm over all ranks' experts. A collective call, once a step.
        """
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        device = next(iter(self.weights.values())).device
        square = torch.zeros((), dtype=torch.float64, device=device)
        if gradients:
            torch._foreach_mul_(gradients, 1 / self.ranks)
            square += nn.utils.get_total_norm(gradients).double().square()
        torch.distributed.all_reduce(square)
        return float(square.sqrt())

    def step(self) -> None:
        """Apply the gradients and drop them."""
        if self.optimizer is None:
            return
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, master in self.masters.items():
            self._refresh(name, master)

    def gather(self, name: str, key: str, owner: int) -> Tensor | None:
        """State `key` of the whole stack (E, ...), on rank `owner`'s CPU; None on the others. A collective call."""
        share = self._state(name, key).detach().to(self.weights[name].device)
        is_owner = torch.distributed.get_rank() == owner
        parts = [torch.empty_like(share) for _ in range(self.ranks)] if is_owner else None
        torch.distributed.gather(share, parts, dst=owner)
        return None if parts is None else torch.cat(parts).cpu()

    def begin_restore(self, adam_step: int) -> None:
        """Empty moments after `adam_step` updates."""
        if self.optimizer is None:
            return
        for master in self.masters.values():
            self.optimizer.state[master] = empty_moments(master, adam_step)

    def set(self, name: str, key: str, full: Tensor) -> None:
        """Write this rank's share of `full` (E, ...) into state `key`."""
        share = full.chunk(self.ranks)[torch.distributed.get_rank()]
        state = self._state(name, key)
        with torch.no_grad():
            state.copy_(share)
        if state is self.masters[name]:
            self._refresh(name, state)

    def _state(self, name: str, key: str) -> Tensor:
        master = self.masters[name]
        if key == "master":
            return master
        if self.optimizer is None:
            raise RuntimeError("no expert is trained here, so none has moments")
        moments: dict[str, Tensor] = self.optimizer.state[master]
        return moments[key]

    def _refresh(self, name: str, master: Tensor) -> None:
        weight = self.weights[name]
        if weight is not master:
            weight.data.copy_(master)


def empty_moments(master: Tensor, adam_step: int) -> dict[str, Tensor]:
    """AdamW's state of `master` with moments of zeros after `adam_step` updates."""
    return {
        "step": torch.tensor(float(adam_step), dtype=torch.float32, device=master.device),
        "exp_avg": torch.zeros_like(master),
        "exp_avg_sq": torch.zeros_like(master),
    }


def _adds_to(master: Tensor) -> Callable[[Any], None]:
    """A hook that moves a weight's gradient into its master's, where micro-batches add up in fp32."""

    def move(weight: Tensor) -> None:
        grad = weight.grad
        weight.grad = None
        if grad is None:
            return
        if master.grad is None:
            master.grad = grad.to(master.device, master.dtype)
        else:
            master.grad.add_(grad.to(master.device))

    return move
