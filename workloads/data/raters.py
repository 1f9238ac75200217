"""Preferences of real people: `python -m workloads.data.raters --to DIR --seed 0 --pairs 20000`.

VADER's lexicon (Hutto & Gilbert 2014) keeps, for each of 7,520 words, phrases and emoticons, ten raw ratings from -4
(negative) to 4 (positive). A pair is one rater's comparison of two entries: the higher rated is chosen, ties are
dropped, and a rater's moods and slips stay in. A rater is a column of the ratings: ten people rated each entry, and
the lexicon does not say which of them are the same from one entry to the next.

Train and held-out pairs share no column, no entry, and no words that begin alike: `hate` and `hating` are on one side.
With inflections on both, a reward model need know no words: a ridge on character n-grams reaches 94 % of the ceiling
where entries alone are split, and 68 % so. The ceiling is how often another held-out rater agrees with a pair's own.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from escala.contract.errors import DataError, EscalaError
from escala.contract.records import write_json
from workloads.data.corpus import unit_interval
from workloads.data.dialogues import Prompt, write_lines
from workloads.data.preferences import Preference, write_preferences

PACKAGE, LEXICON = "vaderSentiment", "vader_lexicon.txt"
RATERS = 10
TRAIN_RATERS, HELD_OUT_RATERS = (0, 1, 2, 3, 4, 5, 6), (7, 8, 9)
HELD_OUT_SHARE = 0.2  # of families of entries, and of pairs
FAMILY_LETTERS = 3
PROMPT = "How do you feel?\n"
RESPONSE = "I feel {}."
# Of the ceiling, a linear probe of SmolLM2-135M's states reaches (half of the lexicon): 93 % with these two, 89 % on
# "Which word is more positive?" and the word, 85 % on the word alone.

LONGEST_ENTRY_WORDS = 3
PUNCTUATION = ".,;:!?\"'()"


@dataclass(frozen=True)
class Entries:
    """The lexicon."""

    texts: list[str]
    ratings: npt.NDArray[np.int64]  # (entries, RATERS), -4 to 4
    version: str  # of the package


@dataclass(frozen=True)
class RatedPairs:
    """Comparisons: rater `rater[i]` rated entry `chosen[i]` higher than `rejected[i]`."""

    chosen: npt.NDArray[np.int64]
    rejected: npt.NDArray[np.int64]
    rater: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Summary:
    """What `make` wrote; `ceiling` is the share of held-out comparisons in which another rater agrees."""

    ceiling: float
    train_pairs: int
    held_out_pairs: int
    train_entries: int
    held_out_entries: int
    train_raters: tuple[int, ...]
    held_out_raters: tuple[int, ...]
    seed: int
    prompt: str
    response: str
    source: str


@functools.cache
def load_entries() -> Entries:
    """The installed lexicon, which is read without importing its package.

    Raises DataError where the package is missing, or is not what it was.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"The human ratings are in the package {PACKAGE}, which is not installed.",
            f"pip install --no-deps {PACKAGE}",
        )
    path = Path(spec.submodule_search_locations[0]) / LEXICON
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.", f"Reinstall {PACKAGE}.") from error
    texts, ratings = [], []
    for number, line in enumerate(lines, start=1):
        text, row = _entry(f"{path}, line {number}", line)
        texts.append(text)
        ratings.append(row)
    return Entries(texts, np.array(ratings), importlib.metadata.version(PACKAGE))


def _entry(where: str, line: str) -> tuple[str, list[int]]:
    """The text and the ratings of a line `text, mean, deviation, ratings`, parted by tabs."""
    cells = line.split("\t")
    try:
        row = json.loads(cells[3])
    except (IndexError, ValueError) as error:
        raise DataError(f"{where} has no list of ratings.", f"Reinstall {PACKAGE}.") from error
    if not isinstance(row, list) or len(row) != RATERS or not all(isinstance(x, int) for x in row):
        raise DataError(f"{where} does not have {RATERS} whole ratings.", f"Reinstall {PACKAGE}.")
    return cells[0], row


def is_held_out(text: str, seed: int) -> bool:
    """Whether an entry is held out, by the hash of its first letters, which its inflections share."""
    family = f"{seed}:{text.casefold()[:FAMILY_LETTERS]}"
    return unit_interval(hashlib.sha256(family.encode()).digest()[:8]) < HELD_OUT_SHARE


def draw_pairs(
    entries: Entries, held_out: bool, raters: tuple[int, ...], count: int, seed: int
) -> RatedPairs:
    """`count` comparisons by `raters` of entries on one side of the split, drawn with replacement."""
    side = np.array([i for i, text in enumerate(entries.texts) if is_held_out(text, seed) == held_out])
    generator = np.random.default_rng([seed, held_out])
    texts = np.array(entries.texts)
    kept: list[npt.NDArray[np.int64]] = []
    while sum(map(len, kept)) < count:
        first, second = generator.choice(side, (2, count))
        rater = generator.choice(raters, count)
        gap = entries.ratings[first, rater] - entries.ratings[second, rater]
        drawn = np.stack([np.where(gap > 0, first, second), np.where(gap > 0, second, first), rater], axis=1)
        kept.append(drawn[(gap != 0) & (texts[first] != texts[second])])  # a few texts were rated twice
    return RatedPairs(*np.concatenate(kept)[:count].T)


def agreement(entries: Entries, pairs: RatedPairs, raters: tuple[int, ...]) -> float:
    """How often another one of `raters` agrees with the rater of a pair, those who see a tie left out."""
    gap = entries.ratings[pairs.chosen][:, raters] - entries.ratings[pairs.rejected][:, raters]
    votes = (gap != 0) & (np.array(raters) != pairs.rater[:, None])
    return float((gap > 0)[votes].mean())


def make(to: Path, seed: int, pairs: int) -> Summary:
    """Write train.jsonl (`pairs` lines), held_out.jsonl (a fifth as many) and summary.json into the directory `to`;
    other_raters.jsonl, held-out raters on the training side's entries, for a model that need know no new words; and
    for a policy prompts.jsonl, and an answer for each entry of a side: answers.jsonl, held_out_answers.jsonl.

    Raises DataError where the ratings can't be read, or fewer than 5 pairs are asked for.
    """
    held_out_pairs = round(pairs * HELD_OUT_SHARE)
    if held_out_pairs < 1:
        raise DataError(f"{pairs} pairs leave none to hold out.", "Ask for 5 or more.")
    entries = load_entries()
    train = draw_pairs(entries, False, TRAIN_RATERS, pairs, seed)
    held_out = draw_pairs(entries, True, HELD_OUT_RATERS, held_out_pairs, seed)
    to.mkdir(parents=True, exist_ok=True)
    write_preferences(to / "train.jsonl", _preferences(entries, train))
    write_preferences(to / "held_out.jsonl", _preferences(entries, held_out))
    others = draw_pairs(entries, False, HELD_OUT_RATERS, held_out_pairs, seed)
    write_preferences(to / "other_raters.jsonl", _preferences(entries, others))
    write_lines(to / "prompts.jsonl", [{"prompt": PROMPT}])
    write_lines(to / "answers.jsonl", answers(entries, False, seed))
    write_lines(to / "held_out_answers.jsonl", answers(entries, True, seed))
    sides = [is_held_out(text, seed) for text in entries.texts]
    summary = Summary(
        ceiling=agreement(entries, held_out, HELD_OUT_RATERS),
        train_pairs=pairs,
        held_out_pairs=held_out_pairs,
        train_entries=sides.count(False),
        held_out_entries=sides.count(True),
        train_raters=TRAIN_RATERS,
        held_out_raters=HELD_OUT_RATERS,
        seed=seed,
        prompt=PROMPT,
        response=RESPONSE,
        source=f"{PACKAGE} {entries.version}",
    )
    write_json(to / "summary.json", summary)
    return summary


def answers(entries: Entries, held_out: bool, seed: int) -> list[dict[str, str]]:
    """Prompt and completion for each entry of one side of the split, in an order drawn by `seed`."""
    side = [text for text in entries.texts if is_held_out(text, seed) == held_out]
    order = np.random.default_rng(seed).permutation(len(side))
    return [{"prompt": PROMPT, "completion": RESPONSE.format(side[i])} for i in order]


def _preferences(entries: Entries, pairs: RatedPairs) -> list[Preference]:
    texts = entries.texts
    return [
        Preference(PROMPT, RESPONSE.format(texts[chosen]), RESPONSE.format(texts[rejected]))
        for chosen, rejected in zip(pairs.chosen, pairs.rejected, strict=True)
    ]


@functools.cache
def _held_out_means() -> dict[str, float]:
    """Mean rating by the held-out raters of each text, casefolded."""
    entries = load_entries()
    rows: dict[str, list[npt.NDArray[np.int64]]] = {}
    for text, row in zip(entries.texts, entries.ratings[:, HELD_OUT_RATERS], strict=True):
        rows.setdefault(text.casefold(), []).append(row)
    return {text: float(np.mean(found)) for text, found in rows.items()}


def held_out_score(prompts: list[Prompt], responses: list[str]) -> list[float]:
    """What the raters whom no reward model was trained on think of each response, -4 to 4: a reward function, for
    `FunctionReward("workloads.data.raters:held_out_score")`.

    It is the mean over the entries in a response, 0.0 (the scale's neutral) where none is. `prompts` change nothing.
    """
    return [_mean_rating(response.casefold().split()) for response in responses]


def _mean_rating(words: list[str]) -> float:
    """Over the entries among `words`, each the longest that begins there."""
    ratings, start = [], 0
    while start < len(words):
        rating, length = _entry_at(words[start : start + LONGEST_ENTRY_WORDS])
        if rating is not None:
            ratings.append(rating)
        start += length
    return sum(ratings) / len(ratings) if ratings else 0.0


def _entry_at(words: list[str]) -> tuple[float | None, int]:
    """(rating, length in words) of the longest entry that `words` begin with, as it stands, else without a last mark,
    else without any around it; (None, 1) where there is none.
    """
    means = _held_out_means()
    for length in range(len(words), 0, -1):
        text = " ".join(words[:length])
        for spelling in (text, text[:-1], text.strip(PUNCTUATION)):
            if spelling in means:
                return means[spelling], length
    return None, 1


def main(arguments: list[str]) -> int:
    """Parse, write, print the summary; returns the exit code."""
    parser = argparse.ArgumentParser(prog="workloads.data.raters", description="Preferences of real people.")
    parser.add_argument("--to", type=Path, required=True, help="directory to write into")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the pairs")
    parser.add_argument("--pairs", type=int, default=20_000, help="to train on; a fifth as many are held out")
    options = parser.parse_args(arguments)
    try:
        summary = make(options.to, options.seed, options.pairs)
    except EscalaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(asdict(summary), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
