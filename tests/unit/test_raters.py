"""Preferences from the human ratings of vaderSentiment's lexicon: who rated what, and on which side of the split."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from escala.contract.errors import DataError
from workloads.data import raters
from workloads.data.preferences import read_preferences
from workloads.data.raters import HELD_OUT_RATERS, RESPONSE, TRAIN_RATERS, Entries, RatedPairs
from workloads.rewards.function import FunctionReward

needs_ratings = pytest.mark.skipif(
    importlib.util.find_spec(raters.PACKAGE) is None, reason="vaderSentiment is not installed"
)


@pytest.fixture
def entries() -> Entries:
    """300 entries with many ties; every third text is an inflection of the one before, a few stand twice."""
    generator = np.random.default_rng(1)
    stems = ["".join(generator.choice(list("abcdefghij"), 5)) for _ in range(150)]
    texts = [stem + ending for stem in stems for ending in ("", "ing")]
    texts[40], texts[90] = texts[10], texts[20]
    mean = generator.normal(0, 1.5, 300)
    noise = generator.normal(0, 1, (300, raters.RATERS))
    return Entries(texts, np.clip(np.round(mean[:, None] + noise), -4, 4).astype(np.int64), "0")


def sides(entries: Entries, seed: int = 0) -> tuple[RatedPairs, RatedPairs]:
    return (
        raters.draw_pairs(entries, False, TRAIN_RATERS, 2000, seed),
        raters.draw_pairs(entries, True, HELD_OUT_RATERS, 500, seed),
    )


def test_a_pair_is_one_raters_comparison_without_ties(entries: Entries) -> None:
    for pairs, count in zip(sides(entries), (2000, 500), strict=True):
        assert len(pairs.chosen) == len(pairs.rejected) == len(pairs.rater) == count
        for chosen, rejected, rater in zip(pairs.chosen, pairs.rejected, pairs.rater, strict=True):
            assert entries.ratings[chosen, rater] > entries.ratings[rejected, rater]
            assert entries.texts[chosen] != entries.texts[rejected]


def test_sides_share_no_entry_no_inflection_and_no_rater(entries: Entries) -> None:
    train, held_out = sides(entries)
    assert set(train.rater) == set(TRAIN_RATERS)
    assert set(held_out.rater) == set(HELD_OUT_RATERS)
    assert not set(TRAIN_RATERS) & set(HELD_OUT_RATERS)
    beginnings = [
        {entries.texts[i][: raters.FAMILY_LETTERS] for i in (*pairs.chosen, *pairs.rejected)}
        for pairs in (train, held_out)
    ]
    assert not beginnings[0] & beginnings[1]


def test_the_seed_decides_and_nothing_else(entries: Entries) -> None:
    first, again, other = (sides(entries, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first.chosen, again.chosen)
    assert not np.array_equal(first.chosen, other.chosen)


def test_agreement_equals_counting_one_by_one(entries: Entries) -> None:
    pairs = sides(entries)[1]
    agree = disagree = 0
    for chosen, rejected, rater in zip(pairs.chosen, pairs.rejected, pairs.rater, strict=True):
        for other in set(HELD_OUT_RATERS) - {rater}:
            gap = int(entries.ratings[chosen, other]) - int(entries.ratings[rejected, other])
            agree += gap > 0
            disagree += gap < 0
    assert 0 < disagree < agree
    assert raters.agreement(entries, pairs, HELD_OUT_RATERS) == pytest.approx(agree / (agree + disagree))


def test_a_missing_package_and_a_broken_lexicon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raters.load_entries.cache_clear()
    monkeypatch.setattr(raters, "PACKAGE", "no_such_package_of_ratings")
    with pytest.raises(DataError, match="pip install --no-deps no_such_package_of_ratings"):
        raters.load_entries()
    (tmp_path / "broken_ratings").mkdir()
    (tmp_path / "broken_ratings" / raters.LEXICON).write_text("good\t1.9\t0.9\t[2, 1]\n")
    monkeypatch.setattr(raters, "PACKAGE", "broken_ratings")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="line 1 does not have 10 whole ratings"):
        raters.load_entries()


@needs_ratings
def test_the_real_ratings_make_files_with_a_ceiling_of_about_85_percent(tmp_path: Path) -> None:
    assert raters.main(["--to", str(tmp_path), "--seed", "3", "--pairs", "5000"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["train_entries"] + summary["held_out_entries"] == 7520
    assert 0.82 < summary["ceiling"] < 0.88
    train, held_out = (list(read_preferences(tmp_path / f"{side}.jsonl")) for side in ("train", "held_out"))
    assert (len(train), len(held_out)) == (5000, 1000)
    assert not {p.chosen for p in train} & {p.chosen for p in held_out}


@needs_ratings
def test_the_held_out_raters_score_is_a_reward() -> None:
    entries = raters.load_entries()
    reward = FunctionReward("workloads.data.raters:held_out_score")
    known = entries.texts.index("abandoned")
    expected = entries.ratings[known, list(HELD_OUT_RATERS)].mean()
    texts = ["I feel abandoned.", "Abandoned", "the table", ""]
    assert reward.score(texts, texts) == pytest.approx([expected, expected, 0, 0])
    fed_up, happy = reward.score(["", ""], ["fed up", "happy"])
    assert reward.score([""], ["I feel fed up, and happy!"]) == pytest.approx([(fed_up + happy) / 2])
    rows: dict[str, list[float]] = {}
    for text, row in zip(entries.texts, entries.ratings, strict=True):
        rows.setdefault(text.casefold(), []).extend(row[list(HELD_OUT_RATERS)])
    scores = reward.score([""] * len(entries.texts), [RESPONSE.format(text) for text in entries.texts])
    for text, score in zip(entries.texts, scores, strict=True):
        assert score == pytest.approx(np.mean(rows[text.casefold()])), text


def test_too_few_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave none to hold out"):
        raters.make(tmp_path, 0, 2)
