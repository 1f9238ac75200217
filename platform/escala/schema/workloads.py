"""What runs as a job, one record each. Nothing else tests a workload's name or its configuration's class.

To add one: a `Workload` here (or `register`ed at run time), and the module that its `entry_point` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from escala.contract.errors import SpecError
from escala.schema.base import Strict
from escala.schema.bench import AttentionBenchConfig, BenchConfig
from escala.schema.compress import CompressConfig
from escala.schema.convert import AutoFeaturesConfig, ConvertConfig
from escala.schema.finetune import DpoConfig, RewardTrainingConfig, SftConfig
from escala.schema.judge import JudgeConfig
from escala.schema.ppo import PpoConfig
from escala.schema.pretrain import PretrainConfig
from escala.schema.rewards import KINDS as REWARDS
from escala.schema.training import TrainedConfig

Plain = Mapping[str, Any]  # a checked configuration, or a record, as plain data
Content = Literal["dialogues", "preferences", "prompts", "model"]  # of a file that a configuration names
Result = Literal["model", "preferences", "points", "figures"]


@dataclass(frozen=True)
class Measure:
    """The number of a run's record that a sweep of its workload judges trials by.

    Args:
        column: its name in a sweep's table of points.
        label: for people.
        unit: of it; empty for none.
        read: the number in a RunRecord as plain data; None where the run has none.
        higher_is_better: a search maximises it.
        fits_laws: it is the held-out loss of a whole run, to which a law can be fitted.
        while_training: evaluations on the way have it, so that a trial can be stopped early.
        columns: of the record's measures, which else stand in the table.
    """

    column: str
    label: str
    unit: str
    read: Callable[[Plain], float | None]
    higher_is_better: bool = False
    fits_laws: bool = False
    while_training: bool = False
    columns: tuple[str, ...] = ()

    def minimised(self, record: Plain) -> float | None:
        """What a search minimises; None where the run has no such number."""
        found = self.read(record)
        return -found if found is not None and self.higher_is_better else found


@dataclass(frozen=True)
class Sidecar:
    """A service that a job needs beside its workers.

    Args:
        name: for people.
        cpus_key: the key of the configuration that its CPUs follow from.
        needs: its CPUs and GPUs, by a checked configuration as plain data.
    """

    name: str
    cpus_key: str
    needs: Callable[[Plain], dict[str, float]]


@dataclass(frozen=True)
class Workload:
    """A kind of job.

    Args:
        name: what a user types.
        summary: one line for people.
        entry_point: the module that the cluster runs, as `python -m MODULE ATTEMPT.json`.
        config: the class that checks its configuration; None: the control plane's own (a sweep's Space).
        result: what it leaves: a model's checkpoints, a file of preferences, a sweep's points, figures of a device.
        command: what starts it; None: `escala submit NAME`.
        inputs: dotted keys of the configuration that name files (or None), and what these hold.
        prepared_from: sections of the configuration that decide what data a run prepares.
        sidecar: the service that it needs beside its workers.
        objective: what a sweep of it judges its trials by; None: it is not swept.
        chooses_model: model, batch and learning rate may follow by recipe: it starts from no model.
        fixed_tokens: a run trains on as many tokens as planned.
        scalar_head: its model ends in one number for a text (a trunk and a head), not in an unembedding.
    """

    name: str
    summary: str
    entry_point: str
    config: type[Strict] | None
    result: Result = "model"
    command: str | None = None
    inputs: Mapping[str, Content] = field(default_factory=dict)
    prepared_from: tuple[str, ...] = ("data", "start", "tokenizer")
    sidecar: Sidecar | None = None
    objective: Measure | None = None
    chooses_model: bool = False
    fixed_tokens: bool = True
    scalar_head: bool = False

    @property
    def submittable(self) -> bool:
        """Whether `escala submit` takes it."""
        return self.command is None

    @property
    def started_by(self) -> str:
        """The command that starts it."""
        return f"escala {self.command or f'submit {self.name}'}"

    @property
    def trains(self) -> bool:
        """Whether it trains a model: its cost follows from its configuration."""
        return self.config is not None and issubclass(self.config, TrainedConfig)

    def parse(self, plain: dict[str, Any]) -> Any:
        """The checked configuration. Raises pydantic.ValidationError; SpecError where `config` is None."""
        if self.config is None:
            raise SpecError(f"a {self.name}'s configuration is checked by its own command", self.started_by)
        return self.config(**plain)

    def trained(self, config: Strict) -> TrainedConfig:
        """`config`, a configuration of it, as one that trains. Raises SpecError where it trains nothing."""
        if not isinstance(config, TrainedConfig):
            raise SpecError(
                f"what a {self.name} job costs depends on its data", "submit it without --dry-run"
            )
        return config

    def worker_needs(self, config: Plain) -> dict[str, float]:
        """CPUs and GPUs of the workers of a job with this (plain) configuration."""
        resources = config["resources"]
        workers = resources["workers"]
        return {
            "CPU": workers * float(resources["cpus_per_worker"]),
            "GPU": float(workers * resources["gpus_per_worker"]),
        }

    def sidecar_needs(self, config: Plain) -> dict[str, float]:
        """CPUs and GPUs of what runs beside the workers of a job with this (plain) configuration."""
        return {"CPU": 0.0, "GPU": 0.0} if self.sidecar is None else self.sidecar.needs(config)


def _held_out_loss(record: Plain) -> float | None:
    found: float | None = record.get("held_out_loss_nats")
    return found


def _reward(record: Plain) -> float | None:
    found: float | None = (record.get("measures") or {}).get("reward")
    return found


def _rollout_service(config: Plain) -> dict[str, float]:
    """The policy's replicas, and one for the rewards where any is a model."""
    service = config["rollouts"]
    replicas = service["replicas"] + any(REWARDS[section["kind"]].is_served for section in config["rewards"])
    return {"CPU": replicas * service["replica_cpus"], "GPU": replicas * service["replica_gpus"]}


HELD_OUT_LOSS = Measure(
    "loss_nats",
    "held-out loss",
    "nats per token",
    _held_out_loss,
    fits_laws=True,
    while_training=True,
    columns=("ideal_loss_nats",),  # of a corpus whose L(T) is known
)
REWARD = Measure("reward", "reward", "", _reward, higher_is_better=True, columns=("reward", "kl_nats"))
_DIALOGUES: dict[str, Content] = {"data.train": "dialogues", "data.held_out": "dialogues"}
_PREFERENCES: dict[str, Content] = {"data.train": "preferences", "data.held_out": "preferences"}

SWEEP = Workload(
    "sweep",
    "trials of a space, whose points a law is fitted to",
    "escala.sweeps.tuner",
    None,
    result="points",
    command="sweep",
)
BENCH = Workload(
    "bench",
    "what one device does when all of its cluster work",
    "workloads.bench",
    BenchConfig,
    result="figures",
    command="bench device",
)
BENCH_ATTENTION = Workload(
    "bench_attention",
    "how fast each kind of attention is, by context",
    "workloads.bench_attention",
    AttentionBenchConfig,
    result="figures",
    command="bench attention",
)
COMPRESS = Workload(
    "compress",
    "a model in fewer bits, within a loss budget",
    "workloads.compress",
    CompressConfig,
    command="compress",
    inputs={"start.path": "model"},
    prepared_from=("start", "text", "data"),
)
WORKLOADS: dict[str, Workload] = {
    each.name: each
    for each in (
        Workload(
            "pretrain",
            "a model from scratch, on text",
            "workloads.pretrain",
            PretrainConfig,
            objective=HELD_OUT_LOSS,
            chooses_model=True,
        ),
        Workload(
            "convert",
            "an exact model into another kind of attention, on text",
            "workloads.convert",
            ConvertConfig,
        ),
        Workload(
            "auto_features",
            "how many features a converted model needs",
            "workloads.auto_features",
            AutoFeaturesConfig,
            fixed_tokens=False,  # those of each count that is tried
        ),
        Workload("sft", "a model on the answers of dialogues", "workloads.sft", SftConfig, inputs=_DIALOGUES),
        Workload(
            "reward",
            "a reward model, on preferences",
            "workloads.reward",
            RewardTrainingConfig,
            inputs=_PREFERENCES,
            scalar_head=True,
        ),
        Workload(
            "dpo",
            "a model on preferences, without a reward model",
            "workloads.dpo",
            DpoConfig,
            inputs=_PREFERENCES,
        ),
        Workload(
            "ppo",
            "a model on rewards of its own answers",
            "workloads.ppo",
            PpoConfig,
            inputs={"prompts": "prompts"},
            prepared_from=("start", "tokenizer", "prompts", "rewards", "critic", "sampling"),
            sidecar=Sidecar("the rollout service", "rollouts.replica_cpus", _rollout_service),
            objective=REWARD,
            fixed_tokens=False,  # as many as its responses had
        ),
        Workload(
            "judge",
            "preferences among given responses, by a chat model",
            "workloads.judge",
            JudgeConfig,
            result="preferences",
            inputs={"responses": "prompts", "judge.model": "model"},
        ),
        SWEEP,
        BENCH,
        BENCH_ATTENTION,
        COMPRESS,
    )
}


def register(workload: Workload) -> None:
    """Add a workload of one's own. Raises SpecError where the name is taken."""
    if workload.name in WORKLOADS:
        raise SpecError(f"there is a workload {workload.name!r} already", "choose another name")
    WORKLOADS[workload.name] = workload


def get_workload(name: str) -> Workload:
    """The workload called `name`. Raises SpecError."""
    if name not in WORKLOADS:
        raise SpecError(f"there is no workload {name!r}", f"valid: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def submittable() -> list[Workload]:
    """Those that `escala submit` takes."""
    return [each for each in WORKLOADS.values() if each.submittable]


def objective_of(record: Plain) -> Measure:
    """What a run's record (as plain data) is judged by; the held-out loss where its workload is not known."""
    workload = WORKLOADS.get(str(record.get("workload")))
    return (workload and workload.objective) or HELD_OUT_LOSS
