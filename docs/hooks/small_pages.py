"""reference/settings.md, errors.md and python.md: the small ones."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from docs.hooks.markdown import page, prose, table
from docs.hooks.sections import keys
from escala.contract import errors
from escala.settings import RolloutsSettings, Settings

SETTINGS = """# Settings

All are environment variables, and none is needed. A mistake is an error that names the variable.
"""
ERRORS = """# Errors

Whatever escala raises on purpose says what happened, why, and how to fix it. The command line prints both and exits
with the code; in Python all are of `escala.contract.errors` and carry `message`, `hint` and `exit_code`.
Other codes: 130 for an interruption from the keyboard, 141 where whoever read the output has gone.
"""
PYTHON = """# Python

```python
from escala import Escala, fit_law, load_law
```

`Escala()` has every command as a method and answers with a [view](views.md): what `--json` prints. `fit_law` and
`load_law` give a `Law` to compute with, and need no cluster.
"""
CLIENT = """::: escala.client.Escala
    options:
      inherited_members: true
      show_bases: false
"""
LAWS = (
    "escala.laws.fit.fit_law",
    "escala.laws.registry.load_law",
    "escala.laws.law.Law",
    "escala.laws.law.Allocation",
    "escala.laws.intervals.Prediction",
)
ARGUMENTS = (  # that a method of Escala takes, or whose own arguments and errors it names
    "escala.planning.limits.Limits",
    "escala.planning.plans.PlanOptions",
    "escala.planning.plans.plan_kinds",
    "escala.planning.plan_workers.plan_workers",
    "escala.rollouts.tuning.TuneOptions",
    "escala.rollouts.tuning.tune",
    "escala.planning.plans.propose_runs",
    "escala.planning.explore.explore",
    "escala.planning.submission.JobRequest",
    "escala.planning.submission.submit",
    "escala.planning.submission.submit_run",
    "escala.planning.pool_table.explore_pool",
    "escala.planning.bench.write_cluster",
    "escala.planning.bench_attention.write_attention",
    "escala.laws.queries.fit_file",
    "escala.sweeps.launch.plan_sweep",
    "escala.sweeps.launch.sweep",
    "escala.sweeps.launch.fit_sweeps",
    "escala.jobs.actions.retry",
    "escala.jobs.actions.resume",
    "escala.jobs.actions.watch",
    "escala.jobs.compress.compress",
    "escala.jobs.export.export",
    "escala.jobs.tracked_runs.runs",
    "escala.rollouts.deployment.up",
    "escala.rollouts.deployment.scale",
)


def settings_page() -> str:
    """The page of the ESCALA_* variables."""
    return page(
        SETTINGS, *_settings(Settings, "## One home"), *_settings(RolloutsSettings, "## The rollout service")
    )


def _settings(cls: type[BaseSettings], title: str) -> Iterator[str]:
    yield title
    yield prose(cls.__doc__)
    rows = []
    for key in keys(cls):
        names = ", ".join(f"`{name}`" for name in variables(cls, key.name))
        rows.append((names, key.type, key.default, key.bounds, key.meaning))
    yield table(("variable", "type", "default", "bounds", "meaning"), rows)


def variables(cls: type[BaseSettings], name: str) -> list[str]:
    """The environment's names of a setting; the first goes first."""
    field: FieldInfo = cls.model_fields[name]
    if isinstance(field.validation_alias, AliasChoices):
        return [str(each) for each in field.validation_alias.choices]
    return [f"{cls.model_config['env_prefix']}{name}".upper()]


def errors_page() -> str:
    """The page of errors and their exit codes."""
    found = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.EscalaError)
    ]
    rows = [
        (str(each.exit_code), f"`{each.__name__}`", prose(each.__doc__))
        for each in sorted(found, key=lambda each: each.exit_code)
    ]
    return page(ERRORS, table(("exit code", "error", "is"), rows))


def python_page() -> str:
    """The page of the Python interface; mkdocstrings fills it."""
    laws = [f"::: {name}" for name in LAWS]
    arguments = [f"::: {name}" for name in ARGUMENTS]
    return page(PYTHON, "## Escala", CLIENT, "## Laws", *laws, "## What the methods refer to", *arguments)
