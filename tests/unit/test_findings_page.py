"""docs/how-to/laws-findings.md explains every finding that a law may have, in the words that are printed."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs/how-to/laws-findings.md").read_text(encoding="utf-8").split())
WHERE = {  # module -> functions that word findings, notes, or reasons of refused rows
    "health": (
        "_few_points",
        "_never_varied",
        "_not_identified",
        "_too_wide",
        "_conditioning",
        "_several_regimes",
        "_unusual_ratio",
        "_digitised",
    ),
    "rolling": ("problems",),
    "sample": ("effective_sample", "by_curve", "_checked"),
    "units": ("_too_small", "_out_of_order", "_compute", "_ratio", "_loss"),
    "estimate": ("_replicates", "_notes"),
    "priors": ("shrinkage",),
    "table": ("_reasons",),
}
SHORTEST = 9  # letters of a fixed part that tells one finding from another


def worded(module: str, function: str) -> Iterator[str]:
    """The fixed parts of the texts that a function puts together."""
    tree = ast.parse((ROOT / f"platform/escala/laws/{module}.py").read_text(encoding="utf-8"))
    found = next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function
    )
    documented = found.body[0].value if isinstance(found.body[0], ast.Expr) else None
    for node in ast.walk(found):
        if node is not documented and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize(("module", "function"), [(m, f) for m, names in WHERE.items() for f in names])
def test_every_finding_is_on_the_page(module: str, function: str) -> None:
    parts = [part.strip(" :;(),%") for text in worded(module, function) for part in text.split("\n")]
    telling = [part for part in parts if " " in part and len(re.sub(r"\W", "", part)) >= SHORTEST]
    assert telling
    missing = [part for part in telling if " ".join(part.split()) not in PAGE]
    assert not missing, missing
