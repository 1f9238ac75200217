"""Whatever a message names is there: commands and their options, ESCALA_* variables, keys of a spec, modules to run.

Read from the string literals of the code itself, docstrings included, so a command that is renamed is found here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from escala.cli.main import app
from escala.hardware import Cluster
from escala.schema import WORKLOADS
from escala.schema.serve import ServeConfig
from escala.settings import RolloutsSettings, Settings
from escala.spec import JobOptions
from escala.sweeps.space import Space

ROOT = Path(__file__).parents[2]
SOURCES = [p for room in ("platform/escala", "workloads", "tune_spaces") for p in (ROOT / room).rglob("*.py")]
OURS = {
    "ESCALA_CLUSTER_ID",
    "ESCALA_CODE",
    "ESCALA_ONE_NODE",
    "ESCALA_PROCESS",
    "ESCALA_PROCESS_KEY",
    "ESCALA_ROLLOUTS_",
    "ESCALA_X",
}  # of processes; parts of names
THEIRS = {
    "--untracked-files",
    "--no-deps",
    "--error-unmatch",
    "--password",
    "--porcelain",
    "--block",
    "--head",
    "--backend-store-uri",
}  # git's, pip's, Ray's, MLflow's
MODULES = {"--to", "--pairs", "--adapter", "--seed"}  # of `python -m workloads...`
SECTIONS = (
    "training",
    "data",
    "resources",
    "sampling",
    "batch",
    "rollouts",
    "critic",
    "shaping",
    "advantage",
    "kl",
)
PAGES = ("", "tutorials", "how-to")  # folders of docs, of pages that are written by hand for users
Command = Any  # click's


@cache
def strings() -> list[tuple[str, str]]:
    """(file:line, text) of every string literal; X stands for what an f-string fills in."""
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = set()
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                parts |= {id(inner) for inner in ast.walk(node)}
                texts = [v.value if isinstance(v, ast.Constant) else "X" for v in node.values]
                found.append((where, "".join(map(str, texts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                found.append((where, node.value))
    return found


@cache
def root() -> Command:
    """All commands."""
    return typer.main.get_command(app)


def mistake(words: list[str]) -> str | None:
    """What is wrong with the words after `escala`; None where they are a command of ours."""
    command = group = root()
    for before, word in zip(["", *words], words, strict=False):
        if before == "|":
            command = group
        children = getattr(command, "commands", {})
        if word == "|" or word == "...":
            continue
        if word.startswith("-"):
            options = {name for p in command.params for name in p.opts} | {"--help"}
            if word.partition("=")[0] not in options:
                return f"{command.name} has no option {word}"
        elif children:
            if word not in children:
                return f"{command.name} has no command {word}"
            group, command = command, children[word]
    if getattr(command, "commands", {}) and command is not root() and "..." not in words:
        return None if words[-1] in ("laws", "rollouts") else f"{words} lacks a verb"
    return None


def commands() -> Iterator[tuple[str, list[str]]]:
    """(file:line, words) of every command line of ours that a text names."""
    known = root().commands
    for where, text in strings():
        for found in re.finditer(r"(`|^|next: +|; |, or | then |next +)?\bescala ([a-z][^`\n;,]*)", text):
            words = re.findall(r"[^\s()]+", found[2].split(". ")[0].split(": ")[0])
            if found[1] is not None or words[0] in known:
                yield where, words


def verbs(words: list[str]) -> tuple[str, ...]:
    """The command that a line of ours names, without its arguments: ("jobs", "show")."""
    command, path = root(), list[str]()
    for word in words:
        child = getattr(command, "commands", {}).get(word)
        if child is None:
            break
        command, path = child, [*path, word]
    return tuple(path)


def documented() -> Iterator[tuple[str, list[str]]]:
    """(file:line, words) of every command line of ours in a document."""
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]:
        for number, line in enumerate(path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines(), 1):
            for found in re.finditer(r"(?:^|`|\$ |; |&& |\| )escala ([a-z][^`;|]*)", line):
                yield f"{path.relative_to(ROOT)}:{number}", found[1].split()


@cache
def code_of_pages() -> list[tuple[str, str]]:
    """(file:line, text) of what the pages for users set as code within their sentences."""
    pages = [ROOT / "README.md", *(p for folder in PAGES for p in (ROOT / "docs" / folder).glob("*.md"))]
    found = []
    for path in pages:
        fenced = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            fenced ^= line.startswith("```")
            if not fenced:
                spans = re.findall(r"`([^`]+)`", line)
                found += [(f"{path.relative_to(ROOT)}:{number}", text) for text in spans]
    return found


def test_every_command_that_a_text_or_a_document_names_has_its_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {verbs(words): where for where, words in [*documented(), *commands()]}
    assert len(found) > 25
    for path, where in found.items():
        root().main([*path, "--help"], prog_name="escala", standalone_mode=False)
        assert f"Usage: {' '.join(['escala', *path])} " in capsys.readouterr().out, where


def test_every_command_that_a_document_names_is_there() -> None:
    """What follows `escala` in a document begins with a verb of ours, and its options are there."""
    found = list(documented())
    assert len(found) > 40
    assert not [f"{where}: escala {' '.join(words)}" for where, words in found if not verbs(words)]
    wrong = [
        f"{where}: {why}"
        for where, words in found
        if not where.startswith("benchmarks") and (why := mistake([w.rstrip(".,:)") for w in words]))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_command_that_a_text_names_is_there() -> None:
    found = list(commands())
    assert len(found) > 60
    wrong = [f"{where}: escala {' '.join(words)}: {why}" for where, words in found if (why := mistake(words))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("jobs show X --json", True),
        ("up | down | status", True),
        ("jobs show | retry | resume", True),
        ("retry X", False),
        ("jobs list", False),
        ("ps --every", False),
        ("sweep X --resume", True),
        ("jobs", False),
    ],
)
def test_a_wrong_command_is_found(line: str, right: bool) -> None:
    assert (mistake(line.split()) is None) == right


def test_every_option_that_a_text_names_is_there() -> None:
    def options(command: Command) -> Iterator[str]:
        for parameter in command.params:
            yield from parameter.opts
        for child in getattr(command, "commands", {}).values():
            yield from options(child)

    known = {*options(root()), "--help"} | THEIRS | MODULES
    wrong = [
        f"{where}: {option}"
        for where, text in strings()
        if " " in text.strip()  # else an argument for another program, or the declaration itself
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
        if option not in known
    ]
    wrong += [
        f"{where}: {option}"
        for where, text in code_of_pages()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
        if option not in known
    ]
    assert not wrong, "\n".join(wrong)


def test_every_variable_that_a_text_names_is_there() -> None:
    known = {f"ESCALA_{name.upper()}" for name in Settings.model_fields} | OURS
    known |= {f"ESCALA_ROLLOUTS_{name.upper()}" for name in RolloutsSettings.model_fields}
    wrong = [
        f"{where}: {name}"
        for where, text in [*strings(), *code_of_pages()]
        for name in re.findall(r"\bESCALA_[A-Z_]+", text)
        if name not in known
    ]
    assert not wrong, "\n".join(wrong)


def keys(model: type[BaseModel]) -> set[str]:
    """Every dotted key of a configuration."""
    definitions = model.model_json_schema().get("$defs", {})

    def walk(schema: dict[str, Any], prefix: str, depth: int) -> Iterator[str]:
        for part in [schema, *schema.get("anyOf", []), *schema.get("oneOf", []), *schema.get("allOf", [])]:
            found = definitions.get(part["$ref"].rpartition("/")[2], {}) if "$ref" in part else part
            for name, inner in found.get("properties", {}).items():
                yield prefix + name
                if depth < 6:
                    yield from walk(inner, f"{prefix}{name}.", depth + 1)

    return set(walk(model.model_json_schema(), "", 0))


def is_module(key: str) -> bool:
    """A docstring's `training.task` is workloads/training/task.py."""
    section, name = key.split(".")[:2]
    return (ROOT / "workloads" / section / f"{name}.py").exists()


def test_every_key_of_a_spec_that_a_text_names_is_there() -> None:
    models: list[type[BaseModel]] = [each.config for each in WORKLOADS.values() if each.config is not None]
    models += [ServeConfig, Space, Cluster, JobOptions]
    known = set().union(*(keys(model) for model in models))
    pattern = re.compile(rf"(?<![\w./])(?:{'|'.join(SECTIONS)})(?:\.[a-z][a-z_]*)+(?![\w(/])")
    named = [
        (where, key) for where, text in strings() if " " in text.strip() for key in pattern.findall(text)
    ]
    named += [(where, key) for where, text in code_of_pages() for key in pattern.findall(text)]
    assert len(named) > 20
    wrong = [f"{where}: {key}" for where, key in named if key not in known and not is_module(key)]
    assert not wrong, "\n".join(wrong)


def test_every_module_that_a_text_names_is_there() -> None:
    named = {
        (where, name)
        for where, text in strings()
        for name in re.findall(r"python -m ((?:workloads|escala)(?:\.\w+)*)", text)
    }
    assert named
    assert not [(where, name) for where, name in named if find_spec(name) is None]
