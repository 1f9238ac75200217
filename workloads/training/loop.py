"""The training loop that each Ray Train worker runs, whatever the task: restore, evaluate, train, evaluate, save.

Everything that a step needs follows from its number (batch, learning rate, seed), so a resumed run repeats
nothing and stores no more than weights, moments and counters. All ranks agree on every decision through the
one small all-reduce of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from escala.contract.attempt import STOP_REASONS, Watch, check_fence
from escala.contract.errors import CheckpointError, Diverged, Superseded
from escala.contract.files import no_room
from escala.contract.records import AttemptFiles, Progress
from escala.schema import ResourcesConfig
from escala.schema.flops import parameter_counts, training_flops_per_token
from escala.storage.checkpoints import Checkpoint, checkpoint_at, open_checkpoints
from workloads.training import checkpoint, meter, zero
from workloads.training.driver import WorkerInputs
from workloads.training.energy import EnergyMeter, account
from workloads.training.experts import Routers
from workloads.training.report import Reporter
from workloads.training.schedule import learning_rate
from workloads.training.step import accumulate
from workloads.training.task import Evaluation, Task, on_device
from workloads.training.traffic import Traffic

FULL_SECONDS = 5.0  # between two tries to write a checkpoint on a full disk
STOP_CODES = (None, *STOP_REASONS, "superseded")


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


class Trainer:
    """One rank's part of a run. Raises Diverged, CheckpointError, Superseded, and what the task raises.

    Args:
        make_task: the entry point's; called on every rank, in its process group.
        on_evaluation: is told the step and what each evaluation found.
    """

    def __init__(
        self,
        inputs: WorkerInputs,
        make_task: Callable[[WorkerInputs], Task],
        on_evaluation: Callable[[int, Evaluation], None] | None = None,
    ) -> None:
        self.inputs, self.spec = inputs, inputs.spec
        self.on_evaluation = on_evaluation
        self.config = config = inputs.config
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = torch.device("cuda" if config.resources.gpus_per_worker else "cpu")
        set_up_torch(config.resources)
        self.reporter = Reporter(self.spec, inputs.run_id) if self.rank == 0 else None
        self.watch = Watch(self.spec)
        self.count = Counters()
        self.flops = training_flops_per_token(config)
        self.task = make_task(inputs)
        meter.reset_peak_memory(self.device)
        self.idle_memory_bytes = meter.memory_bytes(self.device)
        self._build()
        self._measure()
        self.throughput = meter.Throughput()
        self.energy = EnergyMeter(self.device)

    def _build(self) -> None:
        training = self.config.training
        self.micro_batch = self.config.micro_batch_sequences
        self.micro_steps = training.batch_sequences // (self.ranks * self.micro_batch)
        torch.manual_seed(training.seed)
        model = self.task.build()
        self.routers = Routers(model, self.config.total_steps)
        self.engine = zero.make_engine(model, training, self.micro_batch, self.micro_steps)
        self._count_parameters()

    def _count_parameters(self) -> None:
        held = torch.zeros(self.ranks, dtype=torch.int64, device=self.device)
        held[self.rank] = zero.parameters_held(self.engine)
        self.traffic = Traffic()
        self.step_traffic_bytes: float | None = None  # of the last step
        torch.distributed.all_reduce(held)
        self.parameters_held = held.tolist()
        self.trained = sum(math.prod(shape) for shape in zero.parameter_shapes(self.engine).values())

    def _measure(self) -> None:
        training = self.config.training
        choice = meter.choose_matmul_precision(training.matmul_precision, self.device)
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        peak = torch.tensor(meter.peak_flops(dtype, self.device), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(peak)
        self.peak_flops = float(peak)
        if self.rank == 0:
            print(choice, flush=True)
            print(
                f"matmul peak of {self.ranks} workers together: {self.peak_flops / 1e9:.1f} GFLOP/s",
                flush=True,
            )
            print(f"parameters held by each rank: {self.parameters_held}", flush=True)

    def run(self) -> None:
        """Train to the end, or to the first reason to stop early."""
        self._restore()
        if self.count.initial is None:
            first = self._evaluate()
            self.count.initial = {**first.record, **first.measures}
        self._tell(
            initial_held_out_loss_nats=self.count.initial.get("held_out_loss_nats"),
            parameters_held=self.parameters_held,
            matmul_precision=torch.get_float32_matmul_precision(),
            peak_flops_per_second=self.peak_flops,
        )
        stop = self._train()
        if stop in (None, "budget"):
            self._evaluate()
        self._finish(stop)

    def _restore(self) -> None:
        if self.inputs.checkpoint is None:
            return
        found = checkpoint_at(self.inputs.checkpoint)
        checkpoint.load(self.engine, found, self.engines_beside())
        saved = found.part("counters", dict)
        self.count = Counters(
            step=found.step,
            train_tokens=saved["train_tokens"],
            compute_flops=saved["compute_flops"],
            initial=saved.get("initial"),
            last_loss=saved.get("last_loss"),
        )
        if self.rank == 0:
            print(f"resumed from {found.address} (step {found.step})", flush=True)
            self._tell(checkpoint=found.address)

    def engines_beside(self) -> dict[str, Any]:
        """Other engines than the model's, by name, for the checkpoint."""
        return {}

    def own_state(self) -> dict[str, Any]:
        """What else the manifest keeps of a run."""
        return {}

    def _train(self) -> str | None:
        """Steps until the end (None) or a reason to stop, which is checkpointed first."""
        total, every = self.config.total_steps, self.config.checkpoint_every_steps
        evaluate_every = self.config.training.evaluate_every_steps
        saved = self.count.step
        while self.count.step < total:
            stop = self._step()
            if stop == "superseded":
                check_fence(AttemptFiles(self.spec.directory), self.spec.attempt)
                raise Superseded(f"attempt {self.spec.attempt} was declared lost while it ran")
            if stop is not None:
                if self.count.step > saved:
                    self._save()
                return stop
            step = self.count.step
            if evaluate_every and step % evaluate_every == 0 and step < total:
                self._evaluate()
            if every and (step % every == 0 or step == total):
                self._save()
                saved = step
        return None

    def _sent_bytes(self) -> float:
        return self.traffic.sent_bytes + self.routers.sent_bytes

    def _step(self) -> str | None:
        """One optimiser step; or, before its update, the reason not to make it."""
        step, config, count = self.count.step, self.config, self.count
        sent_before = self._sent_bytes()
        self.throughput.begin_step()
        size = self.task.size(step)
        step_flops = self.flops * size.tokens
        stop = self.watch.poll(count.attempt_flops, step_flops) if self.rank == 0 else None
        seed_step(config.training.seed * 1_000_003 + step, self.device)
        micro_batches = (
            on_device(self.task.micro_batch(step, micro), self.device) for micro in range(self.micro_steps)
        )
        self.routers.begin_step(step)
        auxiliary = self.routers.loss if self.routers.layers else None
        loss_sum = accumulate(
            self.engine, micro_batches, self.micro_steps, size.units, self.task.loss, auxiliary
        )
        agreed = torch.zeros(2, dtype=torch.float64, device=self.device)
        agreed[0], agreed[1] = loss_sum, STOP_CODES.index(stop)
        if self.ranks > 1:
            torch.distributed.all_reduce(agreed)
        total, code = agreed.tolist()
        loss = total / size.units
        if code:
            return STOP_CODES[int(code)]
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        rate = learning_rate(step, config)
        zero.set_learning_rate(self.engine, rate)
        norm = zero.optimizer_step(self.engine, config.training)
        if not math.isfinite(norm):
            raise self._diverged("the gradient norm is not finite")
        self.throughput.end_step(size.tokens)
        self.step_traffic_bytes = self._sent_bytes() - sent_before
        count.step += 1
        count.last_loss = loss
        count.train_tokens += size.tokens
        count.attempt_tokens += size.tokens
        count.compute_flops += step_flops
        count.attempt_flops += step_flops
        self._report(rate, norm)
        return None

    def _diverged(self, what: str) -> Diverged:
        count = self.count
        last = "none" if count.last_loss is None else f"{count.last_loss:.4f} at step {count.step}"
        return Diverged(
            f"training diverged at step {count.step + 1}: {what} (last finite loss: {last})",
            "lower training.optimizer.learning_rate, or warm up longer; the last checkpoint is from before",
        )

    def _utilization(self, tokens_per_second: float | None) -> float | None:
        return None if tokens_per_second is None else tokens_per_second * self.flops / self.peak_flops

    def _report(self, rate: float, norm: float) -> None:
        count, speed = self.count, self.throughput.recent
        logs = count.step % self.config.training.log_every_steps == 0 or count.step == self.config.total_steps
        if logs:
            self.routers.report(count.step, self.reporter)
        if self.reporter is None:
            return
        if logs:
            self.reporter.metrics(
                count.step,
                {
                    "train_loss_nats": count.last_loss,
                    "learning_rate": rate,
                    "gradient_norm": norm,
                    "tokens_per_second": speed,
                    "model_flops_utilization": self._utilization(speed),
                    "train_tokens": count.train_tokens,
                },
            )
        self._progress(force=count.step == self.config.total_steps)

    def _progress(self, force: bool = False) -> None:
        if self.reporter is None:
            return
        count, speed = self.count, self.throughput.recent
        self.reporter.progress(
            Progress(
                step=count.step,
                total_steps=self.config.total_steps,
                train_tokens=count.attempt_tokens,
                compute_flops=count.attempt_flops,
                wall_seconds=self.throughput.wall_seconds,
                loss_nats=count.last_loss,
                tokens_per_second=speed,
                model_flops_utilization=self._utilization(speed),
                updated_at=time.time(),
            ),
            force,
        )

    def _evaluate(self) -> Evaluation:
        result = self.task.evaluate(self.engine)
        if self.reporter is not None:
            count = self.count
            print(f"step {count.step}: {result}", flush=True)
            self.reporter.metrics(count.step, {**result.record, **result.measures})
            for path, content in result.texts.items():
                self.reporter.text(path, content)
            self._tell(**result.record, measures=result.measures)
        if self.on_evaluation is not None:
            self.on_evaluation(self.count.step, result)
        return result

    def _save(self) -> Checkpoint:
        """Checkpoint the present step; the fence is checked first, so that a lost attempt writes nothing."""
        if self.rank == 0:
            check_fence(AttemptFiles(self.spec.directory), self.spec.attempt)
        if self.reporter is not None:
            self.reporter.flush()  # a killed worker's steps before a checkpoint are not made again to be reported
        count = self.count
        manifest = {
            "config": self.config.model_dump(mode="json"),
            "fingerprints": self.inputs.fingerprints,
            "versions": self.spec.versions,
            "job_id": self.spec.job_id,
            "attempt": self.spec.attempt,
            "workload": self.spec.workload,
            "data": {"next_step": count.step, "sequences": count.step * self.config.training.batch_sequences},
            "counters": {
                "train_tokens": count.train_tokens,
                "compute_flops": count.compute_flops,
                "initial": count.initial,
                "last_loss": count.last_loss,
            },
            **self.own_state(),
        }
        keep, store = self.config.training.keep_checkpoints, open_checkpoints(self.spec.checkpoints)
        saved = self._insist(
            lambda: checkpoint.save(self.engine, store, count.step, manifest, keep, self.engines_beside())
        )
        self._tell(checkpoint=saved.address)
        return saved

    def _insist(self, save: Callable[[], Checkpoint]) -> Checkpoint:
        """Save; on a full disk all ranks, which learn of it together, wait and try again. A request to stop ends
        that: the job then goes on from its last checkpoint.
        """
        said = False
        while True:
            try:
                return save()
            except CheckpointError as error:
                if not no_room(error) or self._asked_to_stop():
                    raise
                if self.rank == 0 and not said:
                    print(f"escala: {error.message}: waiting until there is room", flush=True)
                said = True
                time.sleep(FULL_SECONDS)

    def _asked_to_stop(self) -> bool:
        """Whether rank 0 has been, agreed by all."""
        asked = torch.tensor(int(self.rank == 0 and AttemptFiles(self.spec.directory).control.exists()))
        asked = asked.to(self.device)
        torch.distributed.broadcast(asked, 0)
        return bool(asked)

    def _finish(self, stop: str | None) -> None:
        """Leave the driver what the record needs."""
        memory = torch.tensor(meter.peak_memory_bytes(self.device), dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MAX)
        speed = self.throughput.overall
        count, seconds = self.count, self.throughput.wall_seconds
        spent = account(self.spec, self.config, self.energy.read(), count.attempt_tokens, seconds)
        self._progress(force=True)
        self._tell(
            outcome=stop or "succeeded",
            peak_memory_bytes=int(memory),
            idle_memory_bytes=self.idle_memory_bytes,
            step_seconds=self.throughput.step_seconds,
            communication_bytes=self.step_traffic_bytes,
            tokens_per_second=speed,
            model_flops_utilization=self._utilization(speed),
            **spent,
        )

    def _tell(self, **facts: Any) -> None:
        """Update what the driver will find, whatever happens next."""
        if self.reporter is None:
            return
        count, counts = self.count, parameter_counts(self.config.model)
        self.reporter.facts(
            step=count.step,
            train_tokens=count.train_tokens,
            compute_flops=count.compute_flops,
            attempt_tokens=count.attempt_tokens,
            attempt_flops=count.attempt_flops,
            train_loss_nats=count.last_loss,
            wall_seconds=self.throughput.wall_seconds,
            n_total=counts.n_total,
            n_active=counts.n_active,
            n_non_embedding=counts.n_non_embedding,
            n_trained=self.trained,
            **facts,
        )

    def close(self) -> None:
        """Deliver what is buffered."""
        if self.reporter is not None:
            self.reporter.close()


def seed_step(seed: int, device: torch.device) -> None:
    """Seed what a step draws from. Not torch.manual_seed: for every kind of device that is not there it keeps the
    call, with its traceback, until one is: 2 ms a step, and memory without end.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def set_up_torch(resources: ResourcesConfig) -> None:
    """Threads and determinism: the same seed and world size give the same bits."""
    torch.set_num_threads(resources.threads_per_worker)  # oversubscribed OpenMP costs up to 10x
    if not resources.gpus_per_worker:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # a debugging aid that costs a pass over memory
        )
