"""Tokenised examples: packing, rows, draws."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workloads.data.examples import PADDING, Draws, Sequences, pack, row_batch

SEQUENCES = Sequences.of(
    [
        ([1, 2, 3, 4], [False, False, True, True]),
        ([5, 6, 7], [False, True, True]),
        ([8, 9], [False, True]),
    ]
)


@given(st.lists(st.integers(2, 33), min_size=1, max_size=60))
def test_packing_loses_nothing_and_overfills_nothing(lengths: list[int]) -> None:
    rows = pack(lengths, 32)
    assert Counter(n for row in rows for n in row) == Counter(range(len(lengths)))
    filled = [sum(lengths[n] - 1 for n in row) for row in rows]
    assert max(filled) <= 32
    half_empty = sum(f <= 16 for f in filled)
    assert half_empty <= 1  # two of them would have been one


def test_a_row_gives_every_sequence_its_own_positions_targets_and_document() -> None:
    batch = row_batch(SEQUENCES, [[0, 2], [1]])
    assert batch["tokens_BT"].tolist() == [[1, 2, 3, 8, 0, 0, 0, 0], [5, 6, 0, 0, 0, 0, 0, 0]]
    assert batch["targets_BT"].tolist()[0][:4] == [2, 3, 4, 9]
    assert batch["answers_BT"].tolist()[0][:5] == [False, True, True, True, False]
    assert batch["positions_BT"].tolist()[0][:4] == [0, 1, 2, 0]
    assert batch["documents_BT"].tolist()[0][:5] == [0, 0, 0, 1, PADDING]


def test_rows_of_one_sequence_need_no_documents() -> None:
    assert set(row_batch(SEQUENCES, [[0], [1]])) == {"tokens_BT", "targets_BT", "answers_BT"}


def test_answers_are_counted_as_targets() -> None:
    batch = row_batch(SEQUENCES, [[0, 1, 2]])
    assert SEQUENCES.answer_counts().tolist() == [2, 2, 1]
    assert int(batch["answers_BT"].sum()) == 5


def test_sequences_come_back_from_a_file(tmp_path: Path) -> None:
    SEQUENCES.save(tmp_path / "x.safetensors")
    again = Sequences.load(tmp_path / "x.safetensors")
    for name in ("tokens", "answers", "starts"):
        assert np.array_equal(getattr(again, name), getattr(SEQUENCES, name))


def test_an_epoch_draws_every_item_once_and_ranks_cut_a_step() -> None:
    draws = Draws(10, 4, seed=3)
    drawn = [item for step in range(5) for item in draws.step(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    parts = [draws.micro_batch(1, micro, rank, 2, 1) for micro in range(2) for rank in range(2)]
    assert [item for part in parts for item in part] == draws.step(1)


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    fresh = Draws(7, 3, seed=1)
    used = Draws(7, 3, seed=1)
    for step in range(9):
        used.step(step)
    assert used.step(2) == fresh.step(2)
