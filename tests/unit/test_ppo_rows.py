"""PPO's bookkeeping: the order of prompts, seeds, micro-batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from escala.contract.errors import SpecError, StaleWeights, StateError
from tests.unit.test_ppo_config import config
from workloads.alignment.learner import estimate
from workloads.alignment.microbatches import RolloutBatch, cut, deal, micro_batch, minibatches
from workloads.alignment.rollouts import PromptTokens, RolloutSampler, Scores, Scoring, request_seed
from workloads.generation.protocol import Completion

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)
PROMPTS = [PromptTokens(f"prompt {n}", [n + 1, n + 2]) for n in range(11)]


@given(LENGTHS, st.integers(1, 4), st.integers(60, 400))
def test_ranks_get_every_row_once_in_equally_many_passes_within_the_budget(
    lengths: list[int], ranks: int, budget: int
) -> None:
    shares = deal(lengths, range(len(lengths)), ranks, budget)
    assert sorted(row for share in shares for part in share for row in part) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    for part in (part for share in shares for part in share if part):
        assert len(part) * max(lengths[row] for row in part) <= budget


def test_similar_lengths_meet_and_a_long_row_stands_alone() -> None:
    lengths = [5, 50, 6, 51, 200]
    assert cut(lengths, range(5), 102) == [[0, 2], [1, 3], [4]]
    padded = sum(len(p) * max(lengths[i] for i in p) for p in cut(lengths, range(5), 102))
    assert padded / sum(lengths) < 1.01


@given(st.integers(1, 50), st.integers(1, 8))
def test_minibatches_visit_all_rows_in_an_order_of_their_own(rows: int, count: int) -> None:
    parts = minibatches(rows, count, 3, 5, 0)
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == minibatches(rows, count, 3, 5, 0)
    if rows > 20:
        assert parts != minibatches(rows, count, 3, 5, 1)
        assert parts != minibatches(rows, count, 3, 6, 0)


def rows() -> RolloutBatch:
    columns = {"x": torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])}
    return RolloutBatch([[7, 8, 11, 12, 13], [9, 21]], [2, 1], columns)


def test_a_micro_batch_marks_what_predicts_each_response_token() -> None:
    batch = micro_batch(rows(), [1, 0], torch.device("cpu"))
    assert batch.tokens_BS.tolist() == [[9, 21, 0, 0, 0], [7, 8, 11, 12, 13]]
    assert batch.at_BS.nonzero().tolist() == [[0, 0], [1, 1], [1, 2], [1, 3]]
    assert batch.last_BS.nonzero().tolist() == [[0, 1], [1, 4]]
    assert batch.targets_N.tolist() == [21, 11, 12, 13]
    assert batch.take(rows().columns["x"]).tolist() == [[4, 0, 0], [1, 2, 3]]
    assert batch.place(torch.tensor([4.0, 1.0, 2.0, 3.0])).tolist() == [[4, 0, 0], [1, 2, 3]]
    empty = micro_batch(rows(), [], torch.device("cpu"))
    assert (empty.rows, int(empty.mask_BT.sum()), len(empty.targets_N)) == ([], 0, 0)


def test_rows_of_several_ranks_are_joined_in_one_order() -> None:
    other = RolloutBatch([[5, 6]], [1], {"x": torch.tensor([[9.0]])})
    whole = RolloutBatch.join([other, rows()], [1, 0, 2])
    assert whole.sequences == [[7, 8, 11, 12, 13], [5, 6], [9, 21]]
    assert whole.columns["x"].tolist() == [[1, 2, 3], [9, 0, 0], [4, 0, 0]]
    assert whole.mask_BT.sum(1).tolist() == [3, 1, 1]


def test_a_response_that_is_cut_off_goes_on_or_ends_there() -> None:
    made = RolloutBatch(
        rows().sequences,
        rows().prompt_lengths,
        {n: rows().columns["x"] for n in ("logp_old", "logp_ref", "values")},
    )
    scores, after = torch.tensor([1.0, -1.0]), torch.tensor([5.0, 0.0])
    returns = [
        estimate(config(advantage={"bootstrap": on, "lam": 1.0}), made, scores, torch.arange(2), after, 0.0)[
            "returns"
        ]
        for on in (True, False)
    ]
    torch.testing.assert_close(returns[0], torch.tensor([[6.0, 6.0, 6.0], [-1.0, 0.0, 0.0]]))
    torch.testing.assert_close(returns[1], torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]))


def test_ranks_together_ask_what_one_alone_asks_and_never_the_same_seed_twice() -> None:
    alone = [RolloutSampler(config(), PROMPTS, 0, 1).requests(i) for i in range(4)]
    together = [
        sorted(
            (
                request
                for rank in range(2)
                for request in RolloutSampler(config(), PROMPTS, rank, 2).requests(i)
            ),
            key=lambda request: request[:2],
        )
        for i in range(4)
    ]
    assert together == alone
    seeds = [request[3].seed for iteration in alone for request in iteration]
    assert len(set(seeds)) == len(seeds) == 4 * 16
    asked = [request[2].prompt for iteration in alone for request in iteration if request[1] == 0]
    assert len(set(asked[:11])) == 11  # each once before any twice
    assert 0 <= request_seed(1, 2, 3, 4) < 2**63


class Service:
    """Answers every request with two tokens of version `version`."""

    def __init__(self, version: int) -> None:
        self.version = version

    def generate(self, prompts: list[list[int]], params: list[Any], min_version: int = 0) -> list[Any]:
        if self.version < 0:
            raise TimeoutError
        done = Completion((3, 4), (-1.0, -2.0), "ab", "stop", self.version)
        weights = SimpleNamespace(version=self.version)
        return [SimpleNamespace(completion=done, weights=weights) for _ in prompts]

    def score(self, prompts: list[Any], responses: list[str]) -> list[float]:
        return [10.0] * len(responses)


def test_a_response_of_other_weights_or_none_in_time_is_an_error() -> None:
    drawing = RolloutSampler(config(), PROMPTS, 0, 1)
    found = drawing.draw(Service(5), 0, 5)
    assert [(one.slot, one.number) for one in found] == [(s, n) for s in range(8) for n in range(2)]
    with pytest.raises(StaleWeights, match="version 4, and 5"):
        drawing.draw(Service(4), 0, 5)
    with pytest.raises(StateError, match="in time"):
        drawing.draw(Service(-1), 0, 5)


def test_functions_score_here_and_models_at_the_service() -> None:
    here = {"kind": "function", "function": "tests.reward_functions:count_a", "weight": 2.0}
    served = {"kind": "model", "model": "reward"}
    responses = RolloutSampler(config(), PROMPTS, 0, 1).draw(Service(1), 0, 1)
    both = Scoring(config(rewards=[here, served]))
    assert both.score(Service(1), responses) == Scores(
        [12.0] * 16, {"count_a": [1.0] * 16, "served": [10.0] * 16}
    )
    assert Scoring(config(rewards=[here])).score(Service(1), responses).sums == [2.0] * 16
    with pytest.raises(SpecError, match="finite in fp32"):
        Scoring(config(rewards=[{**here, "function": "tests.reward_functions:nothing"}])).score(
            Service(1), responses
        )


def test_the_order_of_prompts_is_the_seeds() -> None:
    orders = [
        [
            request[2].prompt
            for request in RolloutSampler(config(training={"seed": s}), PROMPTS, 0, 1).requests(0)
        ]
        for s in (0, 0, 1)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert np.unique(orders[0]).size == 8
