"""What the outside learns of a run while it trains: metrics, progress, the facts of its record. Rank 0 tells it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed

from escala.contract.records import Progress
from escala.schema import TrainedConfig
from escala.schema.flops import parameter_counts, training_flops_per_token
from workloads.training import meter, zero
from workloads.training.device import measure_peak
from workloads.training.energy import EnergyMeter, account
from workloads.training.entry import WorkerInputs
from workloads.training.report import Reporter
from workloads.training.spectrum import spectrum_metrics
from workloads.training.step import Counters, StepResult
from workloads.training.task import Evaluation


class RunStatus:
    """One rank's; all ranks have one, since some figures are over all of them.

    Args:
        count: how far the run is; the run loop counts on in it.
    """

    def __init__(self, inputs: WorkerInputs[Any], count: Counters, device: torch.device) -> None:
        self.spec, self.count, self.device = inputs.spec, count, device
        self.config: TrainedConfig = inputs.config
        self.reporter = Reporter(self.spec, inputs.run_id) if torch.distributed.get_rank() == 0 else None
        self.flops_per_token = training_flops_per_token(self.config)
        self.sent_bytes: float | None = None  # of the last step

    def measure_idle_memory(self) -> None:
        """Before the engines are made."""
        meter.reset_peak_memory(self.device)
        self.idle_memory_bytes = meter.memory_bytes(self.device)

    def measure(self, engine: Any) -> None:
        """Count the engine's parameters, measure the device, start the clocks. A collective call."""
        held = torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64, device=self.device)
        held[torch.distributed.get_rank()] = zero.parameters_held(engine)
        torch.distributed.all_reduce(held)
        self.parameters_held: list[int] = held.tolist()
        self.trained = sum(math.prod(shape) for shape in zero.parameter_shapes(engine).values())
        self.peak_flops = measure_peak(self.config.training, self.device)
        if self.reporter is not None:
            print(f"parameters held by each rank: {self.parameters_held}", flush=True)
        self.throughput = meter.Throughput()
        self.energy = EnergyMeter(self.device)

    def first_evaluation(self) -> None:
        """What is known before the first step."""
        initial = self.count.initial or {}
        self.tell(
            initial_held_out_loss_nats=initial.get("held_out_loss_nats"),
            parameters_held=self.parameters_held,
            matmul_precision=torch.get_float32_matmul_precision(),
            peak_flops_per_second=self.peak_flops,
        )

    def is_logged(self) -> bool:
        """Whether the metrics of the step just made are reported."""
        step, config = self.count.step, self.config
        return step % config.training.log_every_steps == 0 or step == config.total_steps

    def step_made(self, result: StepResult) -> None:
        """After each step, once it is counted."""
        self.sent_bytes = result.sent_bytes
        if self.reporter is None:
            return
        count, speed = self.count, self.throughput.recent
        if self.is_logged():
            self.reporter.metrics(
                count.step,
                {
                    "tokens_per_second": speed,
                    "model_flops_utilization": self._utilization(speed),
                    "train_tokens": count.train_tokens,
                },
            )
        self._progress(force=count.step == self.config.total_steps)

    def spectrum(self, engine: Any) -> None:
        """What the engine's matrices hold. A collective call."""
        found = spectrum_metrics(engine, self.count.step)
        if self.reporter is not None:
            self.reporter.metrics(self.count.step, dict(found))

    def evaluated(self, result: Evaluation) -> None:
        """After each evaluation."""
        if self.reporter is None:
            return
        if not result.is_reported:
            print(f"step {self.count.step}: {result}", flush=True)
            self.reporter.metrics(self.count.step, {**result.record, **result.measures})
            for path, content in result.texts.items():
                self.reporter.text(path, content)
        self.tell(**result.record, measures=result.measures)

    def notice(self, notices: Mapping[str, str]) -> None:
        """What the last evaluation of the run says of it: a line each, and a tag."""
        if self.reporter is None:
            return
        for tag, text in notices.items():
            print(f"escala: {text}", flush=True)
            self.reporter.tag(tag, text)

    def finished(self, outcome: str) -> None:
        """At the end of a run that did not fail. A collective call."""
        memory = torch.tensor(meter.peak_memory_bytes(self.device), dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MAX)
        speed = self.throughput.overall
        count, seconds = self.count, self.throughput.wall_seconds
        spent = account(self.spec, self.config, self.energy.read(), count.attempt_tokens, seconds)
        self._progress(force=True)
        self.tell(
            outcome=outcome,
            peak_memory_bytes=int(memory),
            idle_memory_bytes=self.idle_memory_bytes,
            step_seconds=self.throughput.step_seconds,
            communication_bytes=self.sent_bytes,
            tokens_per_second=speed,
            model_flops_utilization=self._utilization(speed),
            **spent,
        )

    def tell(self, **facts: Any) -> None:
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

    def flush(self) -> None:
        """Deliver the steps before a checkpoint: a killed worker's are not made again to be reported or counted."""
        if self.reporter is not None:
            self.reporter.flush()
        self._progress(force=True)

    def close(self) -> None:
        """Deliver what is buffered."""
        if self.reporter is not None:
            self.reporter.close()

    def _utilization(self, tokens_per_second: float | None) -> float | None:
        if tokens_per_second is None:
            return None
        return tokens_per_second * self.flops_per_token / self.peak_flops

    def _progress(self, force: bool) -> None:
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
