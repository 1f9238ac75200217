"""Job specs from YAML: defaults < files, in their order < `--set` overrides. Unknown keys fail with the nearest one.

A file holds the workload's own sections (`model`, `data`, `training`, `resources`) and may hold `job`, the
scheduling half (`JobOptions`), which the command line's flags override.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, ValidationError

from escala import documents
from escala.contract.errors import SpecError
from escala.documents import Section
from escala.schema.base import Strict
from escala.schema.flops import parameter_counts, training_flops_per_token
from escala.schema.kinds import Kinds
from escala.schema.serve import ServeConfig
from escala.schema.training import TrainedConfig
from escala.schema.workloads import WORKLOADS, Workload, get_workload, submittable

CORRECT = "correct what is named; `escala submit pretrain --dry-run` prints a spec with every key"
MOST_TOLD = 10  # of what is wrong with a file, in one message


class JobOptions(Strict):
    """How a job is queued and bounded. Budgets sum over the job's attempts."""

    name: str | None = Field(
        None,
        max_length=100,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="for people; need not be unique",
    )
    priority: int = Field(50, ge=0, le=100, description="higher first; equal ones first in, first out")
    retries: int = Field(2, ge=0, le=100, description="new attempts after a lost worker, node or driver")
    after: str | None = Field(None, description="a job that must succeed first")
    max_flops: float | None = Field(
        None, gt=0, description="budget: at it a checkpoint is written and the job ends"
    )
    max_seconds: float | None = Field(
        None, gt=0, description="budget: at it a checkpoint is written and the job ends"
    )
    idempotency_key: str | None = Field(
        None, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$", description="again: the same job"
    )


@dataclass(frozen=True)
class JobSpec:
    """A job, checked: what `escala submit` stores and a workload receives.

    Args:
        chosen: what was left to choose, dotted key -> the choice and its reason.
    """

    workload: str
    entry_point: str
    options: JobOptions
    config: Strict
    chosen: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Workload:
        """The workload's record."""
        return get_workload(self.workload)

    @property
    def trained(self) -> TrainedConfig:
        """The configuration of a job that trains. Raises SpecError for one that trains nothing."""
        return self.kind.trained(self.config)

    def plain(self) -> dict[str, Any]:
        """The workload's configuration as plain data."""
        plain: dict[str, Any] = self.config.model_dump(mode="json")
        return plain


@dataclass(frozen=True)
class Resolved:
    """A spec in full, the values that were derived (dotted key -> value), and what the job will cost in FLOPs."""

    spec: JobSpec
    derived: dict[str, Any]
    n_total: int
    n_active: int
    n_non_embedding: int
    train_tokens: int
    flops_per_token: float
    compute_flops: float


def load_job(
    workload: str,
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> JobSpec:
    """Read and check a job spec.

    Args:
        workload: the name of one in `escala.schema.workloads` that can be submitted.
        files: YAML files; a later one overrides an earlier one, key by key.
        overrides: `a.b=value` with the value in YAML; a number addresses an item of a list.
        options: fields of JobOptions from the command line; None means not given.
        base: a configuration to start from, instead of the defaults.

    Raises SpecError for anything that does not validate, NotFoundError for a file that is not there.
    """
    names = [each.name for each in submittable()]
    if workload not in names:
        known = WORKLOADS.get(workload)
        if known is not None:
            raise SpecError(f"a {workload} is not submitted", f"it is started by `{known.started_by}`")
        raise SpecError(f"there is no workload {workload!r}", _nearest(workload, names))
    kind = WORKLOADS[workload]
    data = written(files, overrides, base)
    job = _mapping(data.pop("job", {}), "job")
    checked = job_options(job, options)
    return JobSpec(workload, kind.entry_point, checked, validate(kind.config or Strict, data, workload))


def job_options(written: Mapping[str, Any], stated: Mapping[str, Any] | None) -> JobOptions:
    """The scheduling half: what a file's `job` section holds, under the command line's flags (None: not given).

    Raises SpecError.
    """
    given = {k: v for k, v in (stated or {}).items() if v is not None}
    flags = Section(given, {name: f"--{name.replace('_', '-')}" for name in given})
    options: JobOptions = validate(JobOptions, merge(written, flags), "job", "job.")
    return options


def load_rollouts(args: Mapping[str, Any]) -> ServeConfig:
    """The rollout service's configuration, checked. Raises SpecError."""
    config: ServeConfig = validate(ServeConfig, dict(args), "args")
    return config


def written(
    files: Iterable[str | Path], overrides: Iterable[str], base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the user wrote, on top of `base`, not yet checked. Raises NotFoundError, SpecError."""
    data: dict[str, Any] = merge({}, deepcopy(base or {}))
    for file in files:
        data = merge(data, documents.read_yaml(Path(file)))
    for override in overrides:
        apply_override(data, override)
    return data


def resolve(spec: JobSpec) -> Resolved:
    """The full spec with what it derived: parameters, tokens and FLOPs (docs/theory D.2).

    Raises SpecError for a job that trains nothing: its FLOPs depend on its data.
    """
    config = spec.trained
    counts = parameter_counts(config.model)
    flops = training_flops_per_token(config)
    return Resolved(
        spec=spec,
        derived={
            **spec.chosen,
            "training.context_tokens": config.context_tokens,
            "training.steps": config.total_steps,
            "training.micro_batch_sequences": config.micro_batch_sequences,
            "training.optimizer.warmup_steps": config.warmup_steps,
            "training.checkpoint_every_steps": config.checkpoint_every_steps,
            "tokens in a step": config.step_tokens,
        },
        n_total=counts.n_total,
        n_active=counts.n_active,
        n_non_embedding=counts.n_non_embedding,
        train_tokens=config.train_tokens,
        flops_per_token=flops,
        compute_flops=flops * config.train_tokens,
    )


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: mappings are merged key by key, everything else is replaced."""
    places = {k: v for each in (base, over) if isinstance(each, Section) for k, v in each.places.items()}
    merged = Section(base, places)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _mapping(data: object, where: str) -> dict[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SpecError(
            f"{where} holds a {type(data).__name__}, not a mapping",
            "write `section:` lines with keys below them",
        )
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one dotted `a.b=value` in `data`, in place; a list's item is `a.0` or `a[0]`. Raises SpecError."""
    key, equals, text = override.partition("=")
    parts = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
    if not equals or not all(parts):
        raise SpecError(
            f"--set {override!r} is not of the form key.subkey=value", "for example --set model.n_layers=6"
        )
    value = documents.parse_value(text, f"--set {override!r}")
    node: Any = data
    for depth, following in enumerate(parts[1:], 1):
        node = _step_into(node, parts[:depth], following, override)
    if isinstance(node, list):
        node[_index(node, parts[-1], override)] = value
        return
    node[parts[-1]] = value
    if isinstance(node, Section):
        node.places[parts[-1]] = "--set"


def _step_into(node: Any, path: list[str], following: str, override: str) -> Any:
    part = path[-1]
    if isinstance(node, list):
        child = node[_index(node, part, override)]
    else:
        child = node.get(part)
        if child is None and following.isdecimal():
            raise SpecError(
                f"--set {override!r}: no file writes {'.'.join(path)}, so it has no item {following} to change",
                f"write the list whole: --set '{'.'.join(path)}=[...]', or in a file",
            )
        if child is None:  # not there, or `section:` without a key below it
            child = node[part] = Section()
    if not isinstance(child, dict | list):
        raise SpecError(
            f"--set {override!r}: {part} is a value, not a section with {following}", "set it directly"
        )
    return child


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(items):
        raise SpecError(
            f"--set {override!r}: {part!r} is not an index of a list of {len(items)}", "indices count from 0"
        )
    return int(part)


def validate(kind: type[Any], data: dict[str, Any], root: str, section: str = "") -> Any:
    """`data` as the pydantic model `kind`. Raises SpecError; an unknown key is answered with the nearest one.

    Args:
        root: what an error of the whole names.
        section: what stands before each key that an error names.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _spec_error(kind, error, data, root, section) from None


def _spec_error(
    kind: type[BaseModel], error: ValidationError, data: Any, root: str, section: str
) -> SpecError:
    messages, hints = [], []
    for item in error.errors(include_url=False):
        written = documents.place(data, item["loc"])
        at = f" ({written})" if written else ""
        path = [documents.short(p) or "''" for p in item["loc"] if not _of_pydantic(p)]
        where = section + ".".join(path) if path else root
        if item["type"] == "extra_forbidden":
            messages.append(f"unknown key {where}{at}")
            hints.append(_nearest(str(item["loc"][-1]), _keys_at(kind, item["loc"][:-1])))
        else:
            given = item.get("input")
            shown = f" (given {_shown(given)})" if isinstance(given, str | int | float | bool) else ""
            messages.append(f"{where}{at}: {item['msg'].removeprefix('Value error, ')}{shown}")
    hint = "; ".join(dict.fromkeys(hints)) or CORRECT
    told = [*dict.fromkeys(messages)]
    more = [f"and {len(told) - MOST_TOLD} more"] if len(told) > MOST_TOLD else []
    return SpecError("; ".join(told[:MOST_TOLD] + more), hint)


def _of_pydantic(part: int | str) -> bool:
    """Whether a part of a location names a member of a union, which nobody wrote."""
    return "[" in str(part) or "(" in str(part)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _keys_at(kind: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """The keys that the model at `location` inside `kind` accepts."""
    candidates: list[type[BaseModel]] = [kind]
    for part in location:
        if not isinstance(part, str):
            continue
        fields = [c.model_fields[part] for c in candidates if part in c.model_fields]
        if fields:
            written = [each for field in fields for each in (field.annotation, *field.metadata)]
            candidates = [m for annotation in written for m in _models_in(annotation)]
        else:  # the tag of a discriminated union
            candidates = [c for c in candidates if _tag(c) == part] or candidates
    return [name for c in candidates for name in c.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, Kinds):
        return list(annotation.values())
    return [m for a in get_args(annotation) for m in _models_in(a)]


def _tag(kind: type[BaseModel]) -> str | None:
    field = kind.model_fields.get("kind")
    return get_args(field.annotation)[0] if field and field.annotation is not None else None


def _nearest(word: str, valid: Iterable[str]) -> str:
    names = sorted(set(valid))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(names)}"
