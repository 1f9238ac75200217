"""What the reference pages are made of: nothing that a user can write or type is without its meaning."""

from __future__ import annotations

import importlib
import re

import pytest
import typer
from pydantic import BaseModel

import escala
from docs.hooks.cli_page import cli_page, commands
from docs.hooks.sections import keys, sections_in, type_of
from docs.hooks.small_pages import ARGUMENTS, LAWS, errors_page, python_page, settings_page, variables
from docs.hooks.specs_page import roots, specs_page
from docs.hooks.views_page import modules, views_page
from escala.cli.main import app
from escala.contract import errors
from escala.schema import attention, engines, rewards
from escala.schema.base import Strict
from escala.schema.data import DataConfig
from escala.schema.training import OptimizerConfig
from escala.schema.workloads import WORKLOADS
from escala.settings import RolloutsSettings, Settings
from escala.views.base import View


def sections() -> list[type[BaseModel]]:
    """Every class that checks something of what a user writes."""
    found = list(roots())
    for section in found:  # grows meanwhile
        for field in section.model_fields.values():
            found += [each for each in sections_in(field.annotation, field.metadata) if each not in found]
    return found


def test_every_key_says_what_it_means() -> None:
    found = [(cls.__name__, key) for cls in [*sections(), Settings, RolloutsSettings] for key in keys(cls)]
    assert len(found) > 300
    assert not [f"{name}.{key.name}: give its Field a description" for name, key in found if not key.meaning]


def test_a_key_has_type_default_bounds_and_unit() -> None:
    rows = {key.name: key for key in keys(OptimizerConfig)}
    assert (rows["learning_rate"].type, rows["learning_rate"].bounds) == ("number", "> 0")
    assert (rows["warmup_steps"].type, rows["warmup_steps"].unit) == ("integer or null", "steps")
    assert (rows["schedule"].type, rows["schedule"].default) == ("`cosine`, `wsd`, `constant`", "`cosine`")
    corpora = {key.name: key for key in keys(DataConfig)}["corpora"]
    assert corpora.default == '`[{"kind": "python_source"}]`'
    assert corpora.type.startswith("list of [python_source](#pythonsourcecorpus) or [files](#filescorpus)")
    assert type_of(dict[str, list[int] | None]) == "map of text to list of integer or null"


def test_every_section_has_one_table_and_every_link_an_anchor() -> None:
    page = specs_page()
    for name, workload in WORKLOADS.items():
        assert (f"### `{name}` {{ #{name} }}" in page) == (workload.config is not None)
    anchors = re.findall(r"\{ #([\w-]+) \}", page)
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) <= set(anchors)
    registered = [*attention.KINDS.values(), *engines.KINDS.values(), *rewards.KINDS.values()]
    assert {kind.__name__.lower() for kind in registered} <= set(anchors)
    for section in sections():
        assert all(f"| `{key.name}` | {key.type} |" in page for key in keys(section))


def test_a_section_that_is_new_is_on_no_page_without_a_meaning() -> None:
    class New(Strict):
        told: int = 1

    assert keys(New)[0].meaning == ""


def test_every_command_option_and_argument_is_on_the_page() -> None:
    page = cli_page()
    found = list(commands(typer.main.get_command(app)))
    assert len(found) > 30
    for path, command in found:
        assert f"# `{path}`\n\n{(command.help or '').splitlines()[0]}" in page
        own = page.partition(f"# `{path}`\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            assert parameter.name == "help" or parameter.help or parameter.hidden, (path, parameter.name)
            if parameter.param_type_name == "option" and parameter.name != "help" and not parameter.hidden:
                assert f"`{parameter.opts[0]}`" in own


def test_every_variable_and_error_is_on_its_page() -> None:
    page = settings_page()
    for cls in (Settings, RolloutsSettings):
        assert all(f"`{name}`" in page for field in cls.model_fields for name in variables(cls, field))
    assert variables(Settings, "tracking_uri") == ["ESCALA_TRACKING_URI", "MLFLOW_TRACKING_URI"]
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", errors_page(), re.MULTILINE)]
    known = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.EscalaError)]
    assert codes == sorted(each.exit_code for each in known)
    assert len(set(codes)) == len(codes)


def test_what_a_method_refers_to_is_on_the_page() -> None:
    shown = re.findall(r"^::: (?:\w+\.)*(\w+)$", python_page(), re.MULTILINE)
    assert set(escala.__all__) <= set(shown)
    docstrings = [method.__doc__ or "" for method in vars_of(escala.Escala)]
    named = {
        name
        for text in docstrings
        for name in re.findall(r"`((?:escala\.)?[a-z]+(?:\.[a-z_]+)*\.\w+)`", text)
    }
    named = {name if name.startswith("escala.") else f"escala.{name}" for name in named}
    named -= {"escala.load_law", "escala.jobs.retention", "escala.sweeps.launch.preview_sweeps"}
    assert len(named) > 10
    assert named <= {*LAWS, *ARGUMENTS}
    for name in (*LAWS, *ARGUMENTS):
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__


def vars_of(cls: type) -> list[object]:
    """What a class and its bases define."""
    return [
        value
        for each in cls.__mro__
        if each is not object
        for value in vars(each).values()
        if callable(value)
    ]


def test_every_view_is_on_its_page_with_its_fields() -> None:
    page = views_page()
    found = [v for m in modules() for v in vars(m).values() if isinstance(v, type) and issubclass(v, View)]
    assert len(found) > 30
    for view in found:
        if view is not View:
            own = page.partition(f"### {view.__name__}\n")[2].partition("\n### ")[0]
            assert own, view
            assert all(f"| `{name}` |" in own for name, f in view.model_fields.items() if not f.exclude), view


@pytest.mark.parametrize("cls", sections(), ids=lambda cls: cls.__name__)
def test_every_section_says_what_it_is(cls: type[BaseModel]) -> None:
    assert cls.__doc__
