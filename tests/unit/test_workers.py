"""How many workers pay: the closed form, what shares a batch, what fits, what the device's link leaves open."""

from __future__ import annotations

from itertools import pairwise

import pytest

from escala.contract.errors import SpecError
from escala.planning.cost import cost
from escala.planning.workers import choose, workers_curve
from escala.schema import PretrainConfig
from tests.unit.test_cost import PLAIN, cluster, config

LINKED = {"link_bytes_per_second": {"value": 1e12, "source": "a test"}}
TRAINED = {"model": {"n_layers": 2, "d_model": 64, "n_heads": 4}}


@pytest.mark.parametrize(("work", "constant", "best"), [(32.0, 2.0, 16), (8.0, 8.0, 1), (64.0, 1.0, 64)])
def test_cost_times_time_is_least_where_communication_takes_as_long_as_compute(
    work: float, constant: float, best: int
) -> None:
    """T = w/P + c: P T^2 = w^2/P + 2 w c + c^2 P is least at P = w/c; so it is where c is hidden, T = max(w/P, c)."""
    powers = [1 << i for i in range(10)]
    added = choose({p: work / p + constant for p in powers})
    hidden = choose({p: max(work / p, constant) for p in powers})
    assert (added.workers, hidden.workers) == (best, best)
    assert added.fastest == powers[-1]
    assert hidden.fastest == best
    assert hidden.over_fastest == 1
    assert added.over_fastest == pytest.approx(2 * constant / (work / 512 + constant))
    if best > 1:
        twice = (work / (best / 2) + constant) ** 2 * best / 2 / ((2 * constant) ** 2 * best) - 1
        assert added.margin_fewer == added.margin_more == pytest.approx(twice) == pytest.approx(0.125)
    else:
        assert added.margin_fewer is None


def test_of_equal_numbers_the_smallest_is_taken_and_a_margin_is_of_the_next_best() -> None:
    equal = choose({1: 2.0, 4: 1.0})
    assert (equal.workers, equal.fastest, equal.margin_more) == (1, 4, 0)
    found = choose({1: 4.0, 2: 5.0, 4: 1.0, 8: 0.9, 16: 0.55})
    assert found.workers == 4
    assert found.margin_fewer == pytest.approx(16 / 4 - 1)  # of 1, not of its neighbour
    assert found.margin_more == pytest.approx(16 * 0.55**2 / 4 - 1)


def test_rows_are_the_costs_of_the_numbers_that_share_the_batch() -> None:
    asked, eight = config(2, stage=1, batch_sequences=24), cluster(8, device=LINKED)
    found = workers_curve(asked, eight)
    assert [row.workers for row in found.rows] == [1, 2, 3, 4, 6, 8]
    assert (found.max_workers, found.next_workers, found.own_workers) == (8, 12, 2)
    for row in found.rows:
        alone = cost(config(row.workers, stage=1, batch_sequences=24), eight)
        assert (row.step_seconds, row.memory_bytes) == (alone.step_seconds, alone.memory.total)
        assert row.exposed_share == alone.exposed_seconds / alone.step_seconds
    slower = [row.step_seconds for row in found.rows]
    assert all(a > b for a, b in pairwise(slower))
    assert all(a < b for a, b in pairwise(row.speed_up or 0 for row in found.rows))
    first, *others = found.rows
    assert (first.speed_up, first.gain) == (1, None)
    assert all(row.gain is not None and row.gain < 1 for row in others)
    assert [row.workers for row in workers_curve(asked, eight, 1024).rows][-1] == 24


def test_a_stated_micro_batch_and_shared_experts_leave_fewer_numbers() -> None:
    micro = config(1, batch_sequences=24, micro_batch_sequences=4)
    assert [row.workers for row in workers_curve(micro, cluster(24)).rows] == [1, 2, 3, 6]
    moe = {"experts": 6, "chosen": 2, "expert_parallel": True}
    written = {
        "model": {**TRAINED["model"], "moe": moe},
        "training": {"zero_stage": 1, "batch_sequences": 24},
    }
    shared = PretrainConfig.model_validate(written)
    assert [row.workers for row in workers_curve(shared, cluster(24)).rows] == [1, 2, 3, 6]


def test_memory_says_from_which_number_on_it_fits() -> None:
    asked = config(1, stage=3, batch_sequences=64)
    needed = {row.workers: row.memory_bytes for row in workers_curve(asked, cluster(64)).rows}
    device = {"memory_bytes": {"value": needed[4], "source": "a test"}}
    found = workers_curve(asked, cluster(64, device=device))
    assert [row.workers for row in found.rows if not row.fits] == [1, 2]
    assert found.rows[0].speed_up is found.rows[1].gain is None
    assert (found.rows[2].speed_up, found.rows[2].gain) == (1, None)
    assert found.best is not None
    assert found.best.workers >= 4
    tiny = {"memory_bytes": {"value": 1.0, "source": "a test"}}
    assert workers_curve(asked, cluster(64, device=tiny)).best is None


def test_a_device_measured_alone_has_one_worker_and_beyond_the_cluster_the_link_is_extrapolated() -> None:
    alone = workers_curve(config(1), cluster(8, device={"link_bytes_per_second": None}))
    assert [row.workers for row in alone.rows] == [1]
    assert "measured alone" in alone.notes[0]
    assert alone.ends == "the device's link is not known: it was measured alone"
    assert workers_curve(config(1), cluster(8)).ends == "no more share the batch"
    assert workers_curve(config(1), cluster(4)).ends == "more than 4 were not looked at"
    asked = config(1, batch_sequences=1024)
    assert not any("beyond" in note for note in workers_curve(asked, cluster(8)).notes)
    far = workers_curve(asked, cluster(8), 1024)
    assert far.rows[-1].workers == 1024
    assert "beyond the cluster's 8 devices" in far.notes[0]
    assert PLAIN["link_bytes_per_second"]["source"] in far.notes[0]
    with pytest.raises(SpecError, match="max_workers is 0"):
        workers_curve(asked, cluster(8), 0)


def test_workers_are_replaced_only_where_the_schema_admits_them() -> None:
    assert config(1).with_workers(4).micro_batch_sequences == 2
    with pytest.raises(ValueError, match="not a multiple of workers 3"):
        config(1).with_workers(3)
