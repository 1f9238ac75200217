"""The cheapest choices under a bound on the summed loss, against every combination (docs/theory E.6)."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from escala.contract.errors import SpecError, ToleranceNotMet
from workloads.model.compression import assign_bits

Table = list[list[int]]


@st.composite
def _tables(draw: st.DrawFn) -> tuple[Table, Table, int]:
    layers, choices = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    of = st.lists(
        st.lists(st.integers(-20, 60), min_size=choices, max_size=choices), min_size=layers, max_size=layers
    )
    return draw(of), draw(of), draw(st.integers(-40, 200))


def _total(table: Table, chosen: tuple[int, ...] | list[int]) -> int:
    return sum(row[at] for row, at in zip(table, chosen, strict=True))


@settings(max_examples=60, deadline=None)
@given(_tables())
def test_no_combination_that_keeps_the_budget_costs_less(tables: tuple[Table, Table, int]) -> None:
    cost, loss, budget = tables
    kept = [c for c in product(*(range(len(row)) for row in cost)) if _total(loss, c) <= budget]
    if not kept:
        with pytest.raises(ToleranceNotMet):
            assign_bits(cost, loss, budget)
        return
    found = assign_bits(cost, loss, budget)
    assert _total(loss, found) <= budget
    assert _total(cost, found) == min(_total(cost, c) for c in kept)


def test_small_losses_are_told_apart_where_a_solver_would_not() -> None:
    """HiGHS keeps constraints to within 1e-6: three losses of 1e-7 over a budget of 2e-7 must not pass."""
    found = assign_bits([[1, 0]] * 3 + [[1, 0]], [[0, 1e-7]] * 3 + [[0, 1.0]], 2e-7)
    assert sorted(found) == [0, 0, 1, 1]
    assert found[3] == 0


def test_a_budget_that_is_met_exactly_is_kept() -> None:
    assert assign_bits([[2, 1], [2, 1]], [[0, 0.1], [0, 0.2]], 0.1 + 0.2) == [1, 1]
    assert assign_bits([[2, 1], [2, 1]], [[0, 0.1], [0, 0.2]], 0.3) == [
        1,
        1,
    ]  # 0.1 + 0.2 is above it by rounding


def test_a_loss_below_zero_pays_for_another() -> None:
    assert assign_bits([[3, 2], [3, 1]], [[0, -0.5], [0, 0.6]], 0.1) == [1, 1]


def test_what_is_infinite_is_not_chosen() -> None:
    inf = float("inf")
    assert assign_bits([[5, inf, 1], [5, 2, 1]], [[0, 0, inf], [0, inf, 0]], 1) == [0, 2]
    with pytest.raises(ToleranceNotMet, match="no choice"):
        assign_bits([[inf, 1]], [[0, inf]], 1)


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_loss() -> None:
    with pytest.raises(ToleranceNotMet, match=r"0\.3 at least"):
        assign_bits([[1, 2], [1, 2]], [[0.5, 0.1], [0.2, 0.4]], 0.2)


@pytest.mark.parametrize(
    ("cost", "loss", "budget"),
    [
        ([[1, 2]], [[1]], 1),
        ([1, 2], [1, 2], 1),
        ([[1.0]], [[float("nan")]], 1),
        ([[1.0]], [[0.0]], float("nan")),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(cost: object, loss: object, budget: float) -> None:
    with pytest.raises(SpecError):
        assign_bits(cost, loss, budget)  # type: ignore[arg-type]


def test_no_layers_need_no_choice() -> None:
    assert assign_bits([], [], 0.1) == []
