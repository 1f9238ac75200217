"""The house's rules that neither mypy nor import-linter knows: names that stand once, registries that are asked."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from escala.laws.forms import FORMS
from escala.schema import WORKLOADS, attention, engines, rewards

ROOT = Path(__file__).parents[2]
TREES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for top in ("platform/escala", "workloads", "tune_spaces")
    for path in sorted((ROOT / top).rglob("*.py"))
}
REGISTRIES = {  # how code names a thing of the kind -> where its names may be compared, and the names
    "workload": (("platform/escala/schema/workloads.py",), set(WORKLOADS)),
    "form": (("platform/escala/laws/forms",), set(FORMS)),
    "kind": (
        (
            "platform/escala/schema",
            "workloads/model/attention",
            "workloads/rewards",
            "workloads/generation/engines",
        ),
        {*attention.KINDS, *rewards.KINDS, *engines.KINDS},
    ),
}


def compared(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, what is compared, the string) of each comparison with a string, match statements included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = [
                c.value
                for s in sides
                for c in ast.walk(s)
                if isinstance(c, ast.Constant) and isinstance(c.value, str)
            ]
            other = " ".join(ast.unparse(s) for s in sides if not isinstance(s, ast.Constant))
            for text in texts:
                yield node.lineno, other, text
        elif isinstance(node, ast.Match):
            for value in ast.walk(node):
                if isinstance(value, ast.MatchValue) and isinstance(value.value, ast.Constant):
                    yield node.lineno, ast.unparse(node.subject), str(value.value.value)


@pytest.mark.parametrize("kind", REGISTRIES)
def test_no_name_of_a_kind_is_tested_outside_its_registry(kind: str) -> None:
    homes, names = REGISTRIES[kind]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {other} with {text!r}"
        for path, tree in TREES.items()
        if not any(path.is_relative_to(ROOT / home) for home in homes)
        for line, other, text in compared(tree)
        if text in names and kind in other
    ]
    assert not found, found


def test_a_class_name_stands_for_one_thing() -> None:
    where = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                where[node.name].append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_no_entry_is_asked_for_optional_parts_by_name() -> None:
    """`getattr(module, "...")` on what an entry point may or may not have."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and len(node.args) == 3
        and any(word in ast.unparse(node.args[0]) for word in ("entry", "module"))
        and "functions" not in path.name  # a user's own module: its function, named by the user
    ]
    assert not found, found
