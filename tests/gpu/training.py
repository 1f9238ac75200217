"""A training step as DeepSpeed's stage 0 makes it, without DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from escala.schema import TrainingConfig
from workloads.model.transformer import Transformer
from workloads.training.gradient import accumulate
from workloads.training.loss import next_token_loss
from workloads.training.optimizer import adamw, parameter_groups


class PlainEngine:
    """What `accumulate` asks of an engine, and the update. In bf16 the optimiser has fp32 masters."""

    def __init__(self, model: Transformer, training: TrainingConfig) -> None:
        self.module, self.training = model, training
        model.activation_checkpointing = training.activation_checkpointing
        groups = parameter_groups(model, training.optimizer.weight_decay)
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # (master, what is computed with)
        if training.precision == "bf16":
            for group in groups:
                masters = [nn.Parameter(weight.detach().float()) for weight in group["params"]]
                self.pairs += zip(masters, group["params"], strict=True)
                group["params"] = masters
        self.optimizer = adamw(training.optimizer, groups)

    def __call__(self, *inputs: Any) -> Tensor:
        """The model's logits."""
        logits: Tensor = self.module(*inputs)
        return logits

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        """Add up gradients."""
        loss.backward()

    def step(self) -> None:
        """Between micro-batches: nothing."""

    def update(self, rate: float) -> float:
        """Clip and apply the gradient; returns its norm."""
        for master, weight in self.pairs:
            master.grad, weight.grad = (None if weight.grad is None else weight.grad.float()), None
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        masters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(masters, self.training.optimizer.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for master, weight in self.pairs:
                weight.copy_(master)
        return float(norm)


def gradient(engine: PlainEngine, tokens_BT1: Tensor, micro_steps: int = 1) -> Tensor:
    """The gradient of the mean loss over all next tokens, in `micro_steps` parts. Returns the mean loss."""
    units = tokens_BT1[:, 1:].numel()
    parts = tokens_BT1.chunk(micro_steps)
    added = lambda: sum(engine.module.auxiliary_losses().values())  # noqa: E731
    return accumulate(engine, parts, micro_steps, units, next_token_loss, added) / units
