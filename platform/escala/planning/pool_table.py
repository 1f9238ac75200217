"""A pool as a file: its columns are read at once, the loss of a row only when that row is chosen."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from escala.contract.errors import LawError, NotFoundError
from escala.laws.form import Form
from escala.laws.forms import get_form
from escala.laws.inputs import N_ACTIVE
from escala.laws.law import Law
from escala.laws.powers import Floats
from escala.planning import pool as pools
from escala.planning.pool import Pool, Purchase

LOSS = "loss_nats"


@dataclass(frozen=True)
class PoolTable:
    """The cells of a CSV as written. Rows count from 0, without the header."""

    path: str
    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, path: str | Path) -> PoolTable:
        """Raises NotFoundError for an absent file, LawError for one that is no CSV with a header and rows."""
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotFoundError(f"there is no file {path}", "give a CSV with a header") from error
        except UnicodeDecodeError as error:
            raise LawError(f"{path} is not UTF-8 text.", "Save it as CSV in UTF-8.") from error
        try:
            cells = [row for row in csv.reader(text.splitlines(), strict=True) if any(c.strip() for c in row)]
        except csv.Error as error:
            raise LawError(f"{path} is no CSV: {error}.", "Close every quote.") from error
        if len(cells) < 2:
            raise LawError(f"{path} has no header with rows.", "Name the columns in the first line.")
        names = tuple(name.strip() for name in cells[0])
        if len(set(names)) < len(names):
            raise LawError(f"{path} has two columns of one name.", "Rename or remove one of them.")
        for i, row in enumerate(cells[1:]):
            if len(row) != len(names):
                raise LawError(
                    f"{path}, row {i}: {len(row)} cells under {len(names)} names.",
                    "Separate the cells by commas, and write an empty cell for what is missing.",
                )
        return cls(str(path), names, tuple(tuple(cell.strip() for cell in row) for row in cells[1:]))

    def column(self, name: str) -> Floats:
        """The numbers (K,) of a column. Raises LawError where it is absent or a cell is no positive number."""
        i = self.place(name)
        return np.array([self._positive(name, k, row[i]) for k, row in enumerate(self.rows)])

    def loss(self, k: int) -> float:
        """The loss of row k in nats; NaN where the row has none that can be used: a run that failed."""
        try:
            value = float(self.rows[k][self.place(LOSS)])
        except ValueError:
            return math.nan
        return value if math.isfinite(value) and value > 0 else math.nan

    def inputs(self, form: Form, size: str) -> dict[str, Floats]:
        """The form's inputs, each (K,), by the form's names; one that follows from others is computed.

        Raises LawError for a missing column and for a cell that is no positive number.
        """
        out = {}
        for name, column in zip(form.columns, form.needs(size), strict=True):
            derived = next((d for d in form.derived if d.input.name == column), None)
            if column not in self.names and derived is not None:
                known = {source: self.column(source) for source in derived.sources}
                out[name] = np.asarray(derived.compute(known), dtype=np.float64)
            else:
                out[name] = self.column(column)
        return out

    def place(self, name: str) -> int:
        """Which column it is, from 0. Raises LawError where there is none."""
        if name not in self.names:
            raise LawError(
                f"{self.path} has no column {name}.", f"Rename one to it; it has: {', '.join(self.names)}."
            )
        return self.names.index(name)

    def _positive(self, name: str, k: int, cell: str) -> float:
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise LawError(
                f"{self.path}, row {k}, column {name}: {cell!r} is not a positive number.",
                "Give counts and costs as positive numbers; take out a row that could not be made.",
            )
        return value


@dataclass(frozen=True)
class PoolExploration:
    """What was bought, in order, and the law of it. `refused`: chosen rows without a usable loss."""

    purchase: Purchase
    form: Form
    size: str
    parameters: dict[str, float]  # of the formula
    predictions: tuple[float, ...]  # loss of each target row, nats
    refused: tuple[int, ...]
    expected_error: float  # root of the mean squared relative error that the plan expects at the targets
    findings: tuple[str, ...]
    seed: int


def explore_pool(
    pool: str | Path,
    targets: str | Path,
    cost: str,
    budget: float,
    *,
    form: str = "nd",
    size: str = N_ACTIVE.name,
    seed: int = 0,
) -> PoolExploration:
    """Replay a table: choose rows for the targets within `budget`, read the loss of each once it is chosen.

    Args:
        pool: a CSV of the form's inputs, `loss_nats` and the column `cost`.
        targets: a CSV of the form's inputs; a loss in it is not read.
        seed: changes nothing, since nothing in the choice is random; it is kept in the answer.

    Raises:
        NotFoundError: a file is absent.
        LawError: a missing column, a number that is not positive, a budget that buys no row, no usable loss.
    """
    table, chosen_form = PoolTable.read(pool), get_form(form)
    table.place(LOSS)
    rows = Pool(
        chosen_form,
        table.inputs(chosen_form, size),
        PoolTable.read(targets).inputs(chosen_form, size),
        table.column(cost),
    )
    bought = pools.explore_pool(rows, budget, table.loss)
    found = pools.fit_rows(rows, bought.rows, bought.losses)
    refused = tuple(k for k, loss in zip(bought.rows, bought.losses, strict=True) if math.isnan(loss))
    if len(refused) == len(bought.rows):
        raise LawError(
            f"None of the {len(refused)} chosen rows has a usable {LOSS}.",
            "Take failed runs out of the pool.",
        )
    return PoolExploration(
        bought,
        chosen_form,
        size,
        found.parameters,
        tuple(float(x) for x in found.predictions_T),
        refused,
        pools.expected_error(rows, found.theta_P, bought.rows),
        found.findings,
        seed,
    )


def propose_rows(
    law: Law,
    pool: str | Path,
    targets: Mapping[str, Floats] | str | Path,
    cost: str,
    *,
    count: int = 1,
) -> list[tuple[int, float, float]]:
    """Rows of a pool to buy next beside the law's own points, best first: (row, its cost, the expected error after it
    and those before it). Each is chosen as if those before had been measured.

    Args:
        targets: a CSV, or columns of inputs by the names that the law reads.

    Raises NotFoundError, LawError: as `explore_pool`; also for more rows than the pool has.
    """
    table, form = PoolTable.read(pool), law.form
    inputs = table.inputs(form, law.size)
    named = zip(form.columns, form.needs(law.size), strict=True)
    seen = {name: law.points[column].to_numpy(dtype=np.float64) for name, column in named}
    own = len(law.points)
    if isinstance(targets, Mapping):
        aims = {
            n: np.asarray(targets[c], dtype=np.float64)
            for n, c in zip(form.columns, form.needs(law.size), strict=True)
        }
    else:
        aims = PoolTable.read(targets).inputs(form, law.size)
    cost_K = table.column(cost)
    if not 1 <= count <= len(cost_K):
        raise LawError(f"{count} rows of the {len(cost_K)} in the pool.", "Ask for at least 1 and no more.")
    both = {n: np.concatenate([seen[n], inputs[n]]) for n in form.columns}
    rows = Pool(form, both, aims, np.concatenate([np.full(own, cost_K.max()), cost_K]))
    theta_P, bought = pools.log_parameters(rows, law.parameters), list(range(own))
    out = []
    for k in pools.plan(rows, theta_P, bought, math.inf, (0.0,), count):
        bought.append(k)
        out.append((k - own, float(cost_K[k - own]), pools.expected_error(rows, theta_P, bought)))
    return out
