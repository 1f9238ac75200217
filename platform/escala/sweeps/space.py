"""What a sweep varies and by which design, from YAML: a named space in `tune_spaces/` or a user's own file.

about: two sizes, three lengths
design: grid
vary:
  n_total: [100_000, 400_000]                                # an axis of the recipes (sweeps.recipes.AXES)
  tokens: {low: 1e5, high: 1e6, count: 3}                    # three levels, equal steps of the logarithm
  training.optimizer.weight_decay: [0.0, 0.1]                # or any key of the workload's configuration
base: {model: {vocab_size: 1024}, resources: {workers: 1}}   # everything else; it wins over the recipe
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_validator, model_validator

from escala import documents, spec
from escala.contract.errors import NotFoundError
from escala.schema.base import Strict
from escala.schema.workloads import WORKLOADS, get_workload
from escala.sweeps.recipes import AXES, SPACES

Design = Literal["grid", "isoflop", "sobol", "random", "optuna"]
Value = bool | int | float | str


def _level(value: Any) -> Value:
    if not isinstance(value, Value) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("a level is a finite number, a text, true or false")
    return value


Level = Annotated[Value, PlainValidator(_level)]
Seed = Annotated[int, Field(ge=0)]
SPLITS = ("n_total", "n_active", "tokens", "tokens_per_parameter")  # along an isoFLOP curve
CONTEXTS = ("context_tokens", "training.context_tokens", "model.max_context_tokens")

MOST_TRIALS = 10_000


class Range(Strict):
    """Values from `low` to `high`. A grid needs `count` levels."""

    low: float = Field(description="first level")
    high: float = Field(description="last level")
    scale: Literal["log", "linear"] = Field(
        "log", description="levels are equal steps of the logarithm, or of the value"
    )
    count: int | None = Field(None, ge=2, description="levels; drawn designs need none")

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low {self.low:g} has no logarithm; set scale: linear")
        return self


class Bounds(Strict):
    """Both ends included; None: no bound."""

    low: float | None = Field(None, description="the least that is kept")
    high: float | None = Field(None, description="the most that is kept")

    def hold(self, value: float) -> bool:
        """Whether `value` lies between them."""
        return (self.low is None or self.low <= value) and (self.high is None or value <= self.high)


class Repeats(Strict):
    """The cheapest `points` are trained once more with each of these `seeds`: the noise of a run."""

    points: int = Field(1, gt=0, description="the cheapest ones")
    seeds: list[Seed] = Field(min_length=1, description="beside those that every point is trained with")


class Audit(Strict):
    """The largest point once more at half and at twice its learning rate; see `laws.audit`."""

    horizon: float | None = Field(
        None, gt=1, description="also at so many times its tokens, at half, once and twice the rate there"
    )


class EarlyStopping(Strict):
    """ASHA (Li et al. 2020): after `grace` of a trial's evaluations, only the best 1/`reduction` of each rung go on."""

    grace: int = Field(1, gt=0, description="evaluations that every trial gets")
    reduction: int = Field(3, ge=2, description="one of so many goes on from each rung")


class Space(Strict):
    """A sweep's space. Raises ValueError where the parts contradict each other.

    Early stopping and optimisers are for a `search`: their points say nothing about a law, whose every point is a
    whole run with its own decay, chosen before any is seen.
    """

    about: str = Field("", description="one line for people")
    workload: str = Field("pretrain", description="one that has an objective")
    aim: Literal["law", "search"] = Field("law", description="points for a law, or the best configuration")
    design: Design = Field("grid", description="how points are chosen within vary")
    vary: dict[str, list[Level] | Range] = Field(default_factory=dict)
    cells: list[dict[str, Level]] = Field([{}], min_length=1, description="each is crossed with the design")
    within: dict[str, Bounds] = Field(
        default_factory=dict,
        description="points outside are left out; of compute_flops, n_total, n_active, tokens, tokens_per_parameter",
    )
    points: int | None = Field(None, gt=0, description="of sobol, random and optuna")
    design_seed: int = Field(0, ge=0, description="of sobol, random and optuna")
    seeds: list[Seed] = Field([0], min_length=1, description="every point is trained with each")
    own_seeds: bool = Field(
        False,
        description="each point makes seeds of its own from these and its values: points that share one err together",
    )
    repeats: Repeats | None = None
    audit: Audit | None = Field(None, description="of the recipe's learning rate, beside the points")
    branch: Literal["tokens"] | None = Field(
        None,
        description="runs that differ in tokens alone share their first steps, and decay from there (schedule wsd)",
    )
    concurrency: int | None = Field(None, gt=0, description="None: as many as the cluster holds")
    early_stopping: EarlyStopping | None = None
    base: dict[str, Any] = Field(default_factory=dict, description="the workload's configuration")

    @field_validator("workload")
    @classmethod
    def _has_objective(cls, value: str) -> str:
        swept = [name for name, each in WORKLOADS.items() if each.objective is not None]
        if value not in swept:
            raise ValueError(f"no sweep of {value!r}: one of {', '.join(swept)}")
        return value

    @field_validator("vary", mode="before")
    @classmethod
    def _flat(cls, value: object) -> object:
        """`{training: {seed: [...]}}` as `{training.seed: [...]}`, which `--set` writes."""
        return dict(_flatten(value)) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _check(self) -> Space:
        if not self.vary and self.cells == [{}]:
            raise ValueError("nothing varies: give vary, or cells")
        unknown = set(self.within) - {*AXES} | set(self.within) & {"context_tokens"}
        if unknown:
            raise ValueError(f"within cannot bound {', '.join(sorted(unknown))}")
        if self.aim == "law" and (self.early_stopping or self.design == "optuna"):
            what = "early_stopping" if self.early_stopping else "design: optuna"
            raise ValueError(
                f"{what} is for aim: search; a law's points are chosen beforehand and run to their end"
            )
        self._check_sizes()
        self._check_count()
        self._check_design()
        self._check_workload()
        if self.branch is not None:
            self._check_branch()
        return self

    def _check_sizes(self) -> None:
        """No axis is empty; axes of the recipes are amounts."""
        empty = [key for key, axis in self.vary.items() if axis == []]
        if empty:
            raise ValueError(f"{empty[0]} is an empty list")
        levels = [(k, level) for k, axis in self.vary.items() if isinstance(axis, list) for level in axis]
        levels += [item for cell in self.cells for item in cell.items()]
        for key, level in levels:
            if key in AXES and (isinstance(level, bool | str) or level <= 0):
                raise ValueError(f"{key} is a number above 0, not {level!r}")

    def _check_count(self) -> None:
        """A slip of the finger is told before any point is made."""
        axes = [len(axis) if isinstance(axis, list) else axis.count or 1 for axis in self.vary.values()]
        points = math.prod(axes) if self.points is None else self.points
        trials = points * len(self.cells) * len(self.seeds)
        if trials > MOST_TRIALS:
            raise ValueError(f"{trials:,} trials are more than the {MOST_TRIALS:,} of a sweep: vary less")

    def _check_design(self) -> None:
        drawn = self.design in ("sobol", "random", "optuna")
        if drawn != (self.points is not None):
            raise ValueError(f"design: {self.design} {'needs' if drawn else 'takes no'} points")
        if not drawn:
            bare = [key for key, axis in self.vary.items() if isinstance(axis, Range) and axis.count is None]
            if bare:
                raise ValueError(f"a {self.design} needs the count of levels of {', '.join(bare)}")
        if self.design == "isoflop":
            names = set(self.vary).union(*self.cells)
            if "compute_flops" not in names or not names & set(SPLITS):
                raise ValueError(f"an isoflop design varies compute_flops and one of {', '.join(SPLITS)}")
        if self.design == "optuna" and (self.cells != [{}] or self.repeats or self.within or self.own_seeds):
            raise ValueError("optuna chooses its own points: no cells, within, repeats or own_seeds")

    def _check_workload(self) -> None:
        workload = get_workload(self.workload)
        recipes = sorted(self.axes() & set(AXES))
        if recipes and not workload.chooses_model:
            raise ValueError(f"{', '.join(recipes)} choose a model, and {self.workload} starts from one")
        measure = workload.objective
        if measure is None or (self.aim == "law" and not measure.fits_laws):
            raise ValueError(f"a {self.workload} run has no held-out loss, so no law: set aim: search")
        if self.audit and (self.aim != "law" or not workload.chooses_model):
            raise ValueError(
                "an audit is of a law's recipe: it needs aim: law and a workload that chooses its model"
            )
        if self.early_stopping and not measure.while_training:
            raise ValueError(f"a {self.workload} trial is judged by its end alone: leave early_stopping out")

    def _check_branch(self) -> None:
        """Branches of one trunk differ in their length alone, which is therefore an axis of its own."""
        if self.aim != "law" or self.design != "grid" or "tokens" not in self.vary:
            raise ValueError("branch: tokens is for aim: law and design: grid, with tokens in vary")
        others = self.axes() & {"compute_flops", "tokens_per_parameter", "training.optimizer.schedule"}
        if others:
            raise ValueError(
                f"branch: tokens and {', '.join(sorted(others))} do not go together: vary n_total and tokens"
            )

    def axes(self) -> set[str]:
        """Everything that varies."""
        return set(self.vary).union(*self.cells)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        nested = (
            isinstance(item, Mapping) and not {"low", "high"} & set(item) and f"{prefix}{key}" not in AXES
        )
        if nested:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield prefix + str(key), item


def contexts(space: Space) -> list[float]:
    """The contexts that its axes vary; none where its base states the one."""
    found: list[Any] = [cell[key] for cell in space.cells for key in CONTEXTS if key in cell]
    for key in CONTEXTS:
        axis = space.vary.get(key, [])
        found += [axis.low, axis.high] if isinstance(axis, Range) else axis
    return [float(value) for value in found]


def load_space(name: str, overrides: Iterable[str] = ()) -> tuple[str, Space]:
    """A space by the name of a file in `tune_spaces/`, or a YAML file's path; with its name.

    Raises NotFoundError with the names that there are; SpecError for what does not validate.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SPACES / f"{name}.yaml"
        if not path.is_file():
            raise NotFoundError(
                f"there is no space {name!r}",
                f"one of {', '.join(names())}; or give the path of a YAML file",
            )
    data = documents.read_yaml(path)
    for override in overrides:
        spec.apply_override(data, override)
    space: Space = spec.validate(Space, data, path.name)
    return path.stem, space


def names() -> list[str]:
    """The named spaces."""
    return sorted(path.stem for path in SPACES.glob("*.yaml"))
