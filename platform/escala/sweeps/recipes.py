"""The recipes of `tune_spaces`, as sweeps and plans use them: the only module of escala that imports them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from escala import spec
from escala.contract.attempt import flatten
from escala.contract.errors import SpecError
from escala.schema import TrainingConfig
from tune_spaces import recipes
from tune_spaces.recipes import AXES, experts, shape

__all__ = ["AXES", "SPACES", "by_recipe", "experts", "shape"]

SPACES = Path(recipes.__file__).parent  # holds the named spaces, a YAML file each
CLAIMS = {  # what an axis decides, and what the base may therefore not
    "context_tokens": ("training.context_tokens",),
    "tokens": ("training.train_tokens", "training.steps"),
    "tokens_per_parameter": ("training.train_tokens", "training.steps"),
    "compute_flops": ("training.train_tokens", "training.steps"),
}


def by_recipe(written: Mapping[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a configuration that follow from `axes` (names of AXES) by recipe, to go below what
    was `written`. Raises SpecError, also where both decide one thing.
    """
    if not axes:
        return {}
    for section in ("model", "training"):  # the recipe reads them before the whole is checked
        if not isinstance(written.get(section, {}), Mapping):
            raise SpecError(f"{section} is no section", f"write `{section}:` with keys below it")
    given = flatten(written)
    for axis in axes:
        both = [key for key in CLAIMS.get(axis, ()) if key in given]
        if both:
            raise SpecError(
                f"{axis} and {both[0]} are both given, and decide the same", f"take out {both[0]}"
            )
    spec.validate(TrainingConfig, written.get("training", {}), "training", "training.")
    try:
        found: dict[str, Any] = recipes.sections(written, **{key: float(v) for key, v in axes.items()})
    except ValidationError as error:
        asked = ", ".join(f"{key} {float(value):g}" for key, value in axes.items())
        why = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}".removeprefix(
                ": "
            )
            for item in error.errors()
        )
        hint = "correct the model section, or ask for less"
        raise SpecError(f"{asked} with this spec is no model: {why}", hint) from None
    return found
