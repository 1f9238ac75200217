"""What the run loop asks of a workload: one optimiser step (of PPO, one iteration) after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from escala.storage.checkpoints import Checkpoint
from workloads.training.report import Reporter
from workloads.training.task import Evaluation


@dataclass
class Counters:
    """How far the run is. `attempt_*` count this attempt alone."""

    step: int = 0
    train_tokens: int = 0
    compute_flops: float = 0.0
    attempt_tokens: int = 0
    attempt_flops: float = 0.0
    initial: dict[str, Any] | None = None  # held-out loss before the first step, kept over resumes
    last_loss: float | None = None

    def add_step(self, tokens: int, flops: float, loss_nats: float | None) -> None:
        """Count a step that was made."""
        self.step += 1
        self.last_loss = loss_nats
        self.train_tokens += tokens
        self.attempt_tokens += tokens
        self.compute_flops += flops
        self.attempt_flops += flops

    def stored(self) -> dict[str, Any]:
        """What a checkpoint's manifest keeps of them, beside the step."""
        return {
            "train_tokens": self.train_tokens,
            "compute_flops": self.compute_flops,
            "initial": self.initial,
            "last_loss": self.last_loss,
        }

    def restore(self, found: Checkpoint) -> None:
        """Go on from a checkpoint. Raises CheckpointError where its manifest has no counters."""
        saved = found.part("counters", dict)
        self.step = found.step
        self.train_tokens, self.compute_flops = saved["train_tokens"], saved["compute_flops"]
        self.initial, self.last_loss = saved.get("initial"), saved.get("last_loss")


@dataclass(frozen=True)
class StepResult:
    """What a step took."""

    tokens: int  # that the model read, over all ranks, padding left out
    flops_per_token: float  # that each of them cost
    loss_nats: float | None = None  # None: no loss that compares steps
    sent_bytes: float | None = None  # by this rank's collectives; None: not counted


class Step(Protocol):
    """One rank's part of a workload's steps. Everything that a step needs follows from its number, from weights and
    moments, and from `state`. All calls are collective, but for `state` and `close`.
    """

    engine: Any  # the DeepSpeed engine of the run's model, once built

    def build(self) -> None:
        """Make the engines: the same on every rank, drawn from torch's global generator."""
        ...

    def other_engines(self) -> dict[str, Any]:
        """The engines beside `engine` that a checkpoint keeps, by name."""
        ...

    def state(self) -> dict[str, Any]:
        """What else a checkpoint's manifest keeps."""
        ...

    def restore(self, found: Checkpoint) -> None:
        """Take `state` back. Raises CheckpointError where the manifest lacks it."""
        ...

    def begin(self, step: int) -> int:
        """Get ready for step `step` (0, 1, ...). Returns the tokens that it reads: what the budget is asked about."""
        ...

    def run(self, count: Counters) -> StepResult:
        """Make step `count.step`.

        Raises:
            Diverged: on every rank, where something is not finite; what the weights hold then must not be saved.
            agreement.AgreedError: on every rank, where one could not make it; the weights are still the last step's.
        """
        ...

    def report(self, step: int, is_logged: bool, reporter: Reporter | None) -> None:
        """Report what the last step found, after `step` steps.

        Args:
            is_logged: whether this step's metrics are to be reported.
            reporter: rank 0's; None on the others.
        """
        ...

    def evaluate(self) -> Evaluation:
        """What the model is worth now; the same on every rank."""
        ...

    def close(self) -> None:
        """Give up what runs in the background."""
        ...
