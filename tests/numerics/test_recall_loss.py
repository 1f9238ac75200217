"""L(T) of the recall corpus against sums over every sequence of keys, and against a reader of drawn documents."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest

from escala.laws import fit_law
from escala.schema import RecallCorpus
from workloads.data.recall import (
    FIRST_BUCKET,
    HELD_OUT,
    documents,
    group_targets,
    ideal_loss,
    key_probabilities,
    target_groups,
    unseen_share,
)


def corpus(keys: int, values: int, exponent: float = 1.5, **more: int) -> RecallCorpus:
    return RecallCorpus(kind="recall", keys=keys, values=values, exponent=exponent, **more)


@pytest.mark.parametrize(("keys", "exponent"), [(2, 0.0), (3, 1.5), (4, 3.0)])
@pytest.mark.parametrize("pairs", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 8])
def test_the_formula_is_the_mean_over_every_sequence_of_keys(
    keys: int, exponent: float, pairs: int, window: int | None
) -> None:
    one = corpus(keys, 7, exponent)
    p_K = key_probabilities(one)
    loss, by_distance = 0.0, np.zeros(8)
    for sequence in product(range(keys), repeat=pairs):
        probability = math.prod(float(p_K[key]) for key in sequence)
        for at, key in enumerate(sequence):
            loss += probability * -math.log(p_K[key])
            first_visible = 0 if window is None else max(0, -(-(2 * at - window + 1) // 2))
            if key not in sequence[first_visible:at]:
                loss += probability * math.log(7)
            if key in sequence[:at]:
                distance = 1 + sequence[:at][::-1].index(key)
                by_distance[math.ceil(math.log2(distance))] += probability / pairs
    assert ideal_loss(one, 2 * pairs, window) == pytest.approx(loss / (2 * pairs), rel=1e-12)
    groups = target_groups(one, 2 * pairs)
    assert sum(group.share for group in groups) == pytest.approx(1, rel=1e-12)
    assert [2 * group.share for group in groups[FIRST_BUCKET:]] == pytest.approx(
        by_distance[: len(groups) - FIRST_BUCKET], abs=1e-12
    )
    assert sum(g.share * g.ideal_loss_nats for g in groups) == pytest.approx(ideal_loss(one, 2 * pairs))


@pytest.mark.parametrize("context", [32, 128, 512])
def test_drawn_documents_have_the_loss_of_the_formula(context: int) -> None:
    """The mean over windows of what the reader pays, within 4 standard errors."""
    one = corpus(1024, 32, held_out_documents=1024)
    text = np.stack(list(documents(one, HELD_OUT))).astype(np.int64)
    tokens_NT = text.reshape(-1, context)
    p_K = key_probabilities(one)
    paid_N = []
    for row in tokens_NT.tolist():
        known: dict[int, int] = {}
        paid = 0.0
        for key, value in zip(row[0::2], row[1::2], strict=True):
            paid -= math.log(p_K[key])
            if key in known:
                assert known[key] == value
            else:
                paid += math.log(32)
            known[key] = value
        paid_N.append(paid / context)
    documents_D = np.array(paid_N).reshape(1024, -1).mean(axis=1)
    error = documents_D.std(ddof=1) / 32
    assert abs(documents_D.mean() - ideal_loss(one, context)) < 4 * error
    assert error < 0.006
    tokens_NT1 = np.concatenate([tokens_NT, np.zeros((len(tokens_NT), 1), np.int64)], axis=1)
    found = np.bincount(group_targets(one, tokens_NT1).flatten()) / tokens_NT.size
    assert found == pytest.approx([group.share for group in target_groups(one, context)], abs=0.004)


def test_form_t_fitted_to_the_exact_table() -> None:
    """docs/theory A.11: the exponent of the table is neither 1/3 nor its L_inf the true one, at these T."""
    one = corpus(1024, 32)
    contexts = [32, 64, 128, 256, 512]
    points = pd.DataFrame({"context_tokens": contexts, "loss_nats": [ideal_loss(one, t) for t in contexts]})
    law = fit_law(points, "t", bootstrap=0)
    assert law.parameters["zeta"] == pytest.approx(0.289, abs=0.001)
    assert law.parameters["L_inf"] == pytest.approx(1.356, abs=0.003)
    assert ideal_loss(one, 10**7) == pytest.approx(1.460, abs=0.001)


def test_the_share_of_new_keys_falls_from_one_to_none() -> None:
    one = corpus(64, 8)
    shares = [unseen_share(one, 2 * pairs) for pairs in (1, 2, 8, 64, 10**6)]
    assert shares[0] == pytest.approx(1, rel=1e-12)
    assert (np.diff(shares) < 0).all()
    assert shares[-1] == pytest.approx(64 / 10**6, rel=1e-6)
