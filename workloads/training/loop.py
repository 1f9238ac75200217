"""The loop that each worker of a run goes through, whatever its steps are: restore, evaluate, step, evaluate, save.

Everything that a step needs follows from its number (batch, learning rate, seed), so a resumed run repeats nothing and
stores no more than weights, moments and counters. Tokens and FLOPs are counted here alone, and here all ranks agree to
stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic

import torch
import torch.distributed

from escala.contract.attempt import Watch, check_fence
from escala.contract.errors import CheckpointError, Superseded
from escala.contract.files import no_room
from escala.contract.records import STOP_REASONS, AttemptFiles
from escala.storage.base import CheckpointStore
from escala.storage.checkpoints import Checkpoint, checkpoint_at, list_checkpoints, open_checkpoints
from workloads.training import checkpoint
from workloads.training.agreement import AgreedError, from_first_rank
from workloads.training.device import device_of, seed_step, set_up_torch
from workloads.training.entry import C, WorkerInputs
from workloads.training.kernels import choose_kernels, follow_kernels
from workloads.training.status import RunStatus
from workloads.training.step import Counters, Step
from workloads.training.task import Evaluation

FULL_SECONDS = 5.0  # between two tries to write a checkpoint on a full disk
STOP_CODES = (None, *STOP_REASONS, "superseded")
SEED_STRIDE = 1_000_003  # between the seeds of two runs: a step's is seed * SEED_STRIDE + step


class RunLoop(Generic[C]):
    """One rank's part of a run, in its process group. Raises Diverged, CheckpointError, Superseded, and what the step
    raises.

    Args:
        make_step: of the workload's entry.
        on_evaluation: is told the step and what each evaluation found.
    """

    def __init__(
        self,
        inputs: WorkerInputs[C],
        make_step: Callable[[WorkerInputs[C]], Step],
        on_evaluation: Callable[[int, Evaluation], None] | None = None,
    ) -> None:
        self.inputs, self.spec, self.config = inputs, inputs.spec, inputs.config
        self.files = AttemptFiles(self.spec.directory)
        self.on_evaluation = on_evaluation
        self.rank = torch.distributed.get_rank()
        set_up_torch(self.config.resources)
        self.device = device_of(self.config.resources)
        self.count = Counters()
        self.status = RunStatus(inputs, self.count, self.device)
        self.watch = Watch(self.spec)
        self.step = make_step(inputs)
        self.status.measure_idle_memory()
        torch.manual_seed(self.config.training.seed)
        self.step.build()
        self.status.measure(self.step.engine)
        self.kernels: dict[str, str] | None = None
        self.saved_step = 0

    def run(self) -> None:
        """Train to the end, or to the first reason to stop early."""
        self._restore()
        if self.kernels is None:
            self.kernels = choose_kernels(self.step.engine.module, self.config, self.device)
        if self.count.initial is None:
            first = self._evaluate()
            self.count.initial = {**first.record, **first.measures}
        self.status.first_evaluation()
        stop = self._train()
        if stop in (None, "budget"):
            self.status.notice(self._evaluate().notices)
        self.status.finished(stop or "succeeded")

    def close(self) -> None:
        """Deliver what is buffered; wait for nothing that is in flight."""
        self.step.close()
        self.status.close()

    def _restore(self) -> None:
        if self.inputs.checkpoint is None:
            return
        found = checkpoint_at(self.inputs.checkpoint)
        checkpoint.load(self.step.engine, found, self.step.other_engines())
        self.count.restore(found)
        self.step.restore(found)
        self.kernels = follow_kernels(self.step.engine.module, found)
        self.saved_step = self.count.step
        if self.rank == 0:
            print(f"resumed from {found.address} (step {found.step})", flush=True)
        self.status.tell(checkpoint=found.address)

    def _train(self) -> str | None:
        """Steps until the end (None) or a reason to stop, which is checkpointed first."""
        total, every = self.config.total_steps, self.config.checkpoint_every_steps
        evaluate_every = self.config.training.evaluate_every_steps
        while self.count.step < total:
            stop = self._make_step()
            if stop == "superseded":
                check_fence(self.files, self.spec.attempt)
                raise Superseded(f"attempt {self.spec.attempt} was declared lost while it ran")
            if stop is not None:
                self._save_if_new()
                return stop
            step = self.count.step
            if evaluate_every and step % evaluate_every == 0 and step < total:
                self._evaluate()
            if every and (step % every == 0 or step == total):
                self._save()
            if self.spec.trunk and step == self.config.decay_start_step:
                self._save_trunk(self.spec.trunk)
        return None

    def _make_step(self) -> str | None:
        """One step, counted and reported; or the reason not to make it."""
        count, throughput = self.count, self.status.throughput
        throughput.begin_step()
        stop = self._reason_to_stop(self.step.begin(count.step))
        if stop is not None:
            return stop
        seed_step(self.config.training.seed * SEED_STRIDE + count.step, self.device)
        try:
            result = self.step.run(count)
        except AgreedError as agreed:
            self._save_if_new()
            raise agreed.error from None
        throughput.end_step(result.tokens)
        count.add_step(result.tokens, result.tokens * result.flops_per_token, result.loss_nats)
        self.step.report(count.step, self.status.is_logged(), self.status.reporter)
        self.status.step_made(result)
        every = self.config.training.spectrum_every_steps
        if every and (count.step % every == 0 or count.step == self.config.total_steps):
            self.status.spectrum(self.step.engine)
        return None

    def _reason_to_stop(self, tokens: int) -> str | None:
        """Why not to make a step of `tokens`, as rank 0 sees it."""
        stop = None
        if self.rank == 0:
            stop = self.watch.poll(self.count.attempt_flops, self.status.flops_per_token * tokens)
        return STOP_CODES[from_first_rank(STOP_CODES.index(stop), self.device)]

    def _evaluate(self) -> Evaluation:
        result = self.step.evaluate()
        self.status.evaluated(result)
        if self.on_evaluation is not None:
            self.on_evaluation(self.count.step, result)
        return result

    def _save_if_new(self) -> None:
        if self.count.step > self.saved_step:
            self._save()

    def _save(self) -> None:
        """Checkpoint the present step."""
        saved = self._save_in(open_checkpoints(self.spec.checkpoints), self.config.training.keep_checkpoints)
        self.saved_step = saved.step
        self.status.tell(checkpoint=saved.address)

    def _save_trunk(self, address: str) -> None:
        """Keep the last step before the decay, from which the next longer branch goes on, unless a longer one has been
        here before.
        """
        store = open_checkpoints(address)
        later = any(found.step >= self.count.step for found in list_checkpoints(store))
        if not from_first_rank(int(later), self.device):
            self._save_in(store, keep=1)

    def _save_in(self, store: CheckpointStore, keep: int) -> Checkpoint:
        """Write the present step; the fence is checked first, so that a lost attempt writes nothing."""
        if self.rank == 0:
            check_fence(self.files, self.spec.attempt)
        self.status.flush()
        step = self.count.step
        manifest = {
            "config": self.config.model_dump(mode="json"),
            "fingerprints": self.inputs.fingerprints,
            "versions": self.spec.versions,
            "job_id": self.spec.job_id,
            "attempt": self.spec.attempt,
            "workload": self.spec.workload,
            "data": {"next_step": step, "sequences": step * self.config.training.batch_sequences},
            "counters": self.count.stored(),
            "kernels": self.kernels,
            **self.step.state(),
        }
        engine, others = self.step.engine, self.step.other_engines()
        return self._once_there_is_room(lambda: checkpoint.save(engine, store, step, manifest, keep, others))

    def _once_there_is_room(self, save: Callable[[], Checkpoint]) -> Checkpoint:
        """Save; on a full disk all ranks, which learn of it together, wait and try again. A request to stop ends
        that: the job then goes on from its last checkpoint.
        """
        said = False
        while True:
            try:
                return save()
            except CheckpointError as error:
                if not no_room(error) or from_first_rank(int(self.files.control.exists()), self.device):
                    raise
                if self.rank == 0 and not said:
                    print(f"escala: {error.message}: waiting until there is room", flush=True)
                said = True
                time.sleep(FULL_SECONDS)
