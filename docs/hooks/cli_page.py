"""reference/cli.md: every command of the CLI, from its tree of commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from docs.hooks.markdown import page, table
from escala.cli.main import app
from escala.schema.workloads import submittable

DEFAULT = re.compile(r"\s*\[default: (.*)\]$")
WORDS = {str: "TEXT", Path: "PATH", int: "INTEGER", float: "NUMBER"}
HEAD = """# Commands

`escala COMMAND --help` says the same. `--json` prints the answer for programs: one document on stdout. Notes and
progress go to stderr. The exit code is 0, or that of an [error](errors.md).
"""
Command = Any  # of typer's own copy of click


def cli_page() -> str:
    """The page."""
    root = typer.main.get_command(app)
    parts = (part for path, command in commands(root) for part in _command(path, command))
    return page(HEAD, _options(root), *parts)


def commands(group: Command, path: str = "escala") -> Iterator[tuple[str, Command]]:
    """(its words, the command) of each one below a group, groups before what is in them."""
    for name, command in sorted(group.commands.items()):
        if not getattr(command, "hidden", False):
            yield f"{path} {name}", command
            if hasattr(command, "commands"):
                yield from commands(command, f"{path} {name}")


def _command(path: str, command: Command) -> Iterator[str]:
    depth = "#" * (1 + path.count(" "))
    yield f"{depth} `{path}`"
    yield command.help or ""
    if hasattr(command, "commands"):
        return
    arguments = [p for p in command.params if p.param_type_name == "argument" and not p.hidden]
    options = _options(command)
    shown = " ".join([path, *(["[OPTIONS]"] if options else []), *map(_argument, arguments)])
    yield f"```text\n{shown}\n```"
    yield table(("argument", "", "default", "meaning"), (_row(p, f"`{_argument(p)}`") for p in arguments))
    yield options
    if command.name == "submit":
        yield "Workloads, and [every key of their specs](specs.md):"
        yield "\n".join(f"- [`{each.name}`](specs.md#{each.name}): {each.summary}" for each in submittable())


def _options(command: Command) -> str:
    shown = [p for p in command.params if p.param_type_name == "option" and p.name != "help" and not p.hidden]
    return table(("option", "value", "default", "meaning"), (_row(p, _names(p)) for p in shown))


def _argument(parameter: Command) -> str:
    name = (parameter.metavar or parameter.name.upper()).strip("[].")
    name += "..." if parameter.nargs == -1 else ""
    return name if parameter.required else f"[{name}]"


def _names(parameter: Command) -> str:
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _row(parameter: Command, shown: str) -> tuple[str, str, str, str]:
    text = parameter.help or ""
    said = DEFAULT.search(text)
    value = "" if getattr(parameter, "is_flag", False) else _value(parameter)
    if getattr(parameter, "multiple", False):
        value += ", repeatable"
    return shown, value, said[1] if said else _default(parameter), DEFAULT.sub("", text)


def _value(parameter: Command) -> str:
    kind = parameter.type_descriptor.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(kind))
    kind = next(iter(get_args(kind)), kind)  # of a list
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{each.value}`" for each in kind)
    if parameter.param_type_name == "argument":
        return ""
    return f"`{parameter.metavar}`" if parameter.metavar else f"`{WORDS[kind]}`"


def _default(parameter: Command) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or getattr(parameter, "is_flag", False):
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"
