"""Preferences by a judge (RLAIF data, docs/theory C.8): `python -m workloads.judge ATTEMPT.json`. Reads top to bottom.

Every worker judges a share of the prompts and writes its part into the attempt's directory; the driver puts the parts
together in the order of the prompts. A line is a preference with the judge's `win_probability` of the chosen response.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from escala.contract.errors import DataError
from escala.contract.records import write_json
from escala.schema.judge import JudgeConfig
from escala.tracking.lineage.lifecycle import LiveAttempt, run_attempt
from escala.tracking.tracker import Metric
from workloads.data.dialogues import Prompt, prompt_of, read_lines, text_of
from workloads.data.preferences import Preference, write_preferences
from workloads.rewards.judge_models import FirstWins, compare, load_judge_model
from workloads.training.driver import start_workers
from workloads.training.failures import NodeWatch, classify

REPORT_PROMPTS = 100  # a line in the log for so many


def main(arguments: list[str]) -> int:
    """Run one attempt; returns the process's exit code."""
    return run_attempt(arguments, judge, partial(classify, nodes=None))


def judge(attempt: LiveAttempt) -> None:
    """Start the workers, put their parts together; what `totals` says of them is in the facts, and in the run."""
    import ray

    spec, files = attempt.spec, attempt.files
    config = attempt.open(JudgeConfig.model_validate)
    read_responses(Path(config.responses))  # a line that is wrong stops the job before it starts
    ray.init(address="auto", log_to_driver=True, namespace="escala")
    attempt.classify = partial(classify, nodes=NodeWatch())
    arguments = {"config": spec.config, "directory": spec.directory}
    start_workers(judge_share, arguments, config.resources, spec.directory, {})
    paths = [part_path(spec.directory, rank) for rank in range(config.resources.workers)]
    found = totals(merge(paths), config.minimum_margin, Path(config.to))
    write_json(files.facts, found)
    (tracker, run_id), now = attempt.run, time.time_ns() // 1_000_000
    tracker.metrics(run_id, [Metric(name, float(v), 0, now) for name, v in found.items() if v is not None])


def judge_share(arguments: dict[str, Any]) -> None:
    """One rank on its worker."""
    import torch.distributed

    from workloads.training.device import set_up_torch

    config = JudgeConfig(**arguments["config"])
    set_up_torch(config.resources)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    judge_part(config, rank, ranks, arguments["directory"])


def judge_part(config: JudgeConfig, rank: int, ranks: int, directory: str) -> None:
    """Judge the prompts number rank, rank + ranks, ... and write what comes out into `part_path`."""
    examples = read_responses(Path(config.responses))
    model = load_judge_model(config.judge, "cuda" if config.resources.gpus_per_worker else "cpu")
    with part_path(directory, rank).open("w", encoding="utf-8") as stream:
        for index in range(rank, len(examples), ranks):
            for comparison in comparisons(index, examples[index], model):
                stream.write(json.dumps(asdict(comparison), ensure_ascii=False) + "\n")
            if rank == 0 and index % REPORT_PROMPTS == 0:
                print(f"judged {index + 1} of {len(examples)} prompts", flush=True)


def part_path(directory: str, rank: int) -> Path:
    """Where a rank writes."""
    return Path(directory) / f"comparisons-{rank}.jsonl"


@dataclass(frozen=True)
class Responses:
    """A prompt and what was answered to it."""

    prompt: Prompt
    responses: list[str]


@dataclass(frozen=True)
class JudgedPair:
    """A judge's verdict on two responses to prompt number `index`."""

    index: int
    prompt: Prompt
    first: str
    second: str
    win: float  # probability that the first is the better one
    place_bias: float


def read_responses(path: Path) -> list[Responses]:
    """A JSONL file of `prompt` and `responses`. Raises DataError, with file and line."""
    return [_responses(where, record) for where, record in read_lines(path)]


def _responses(where: str, record: dict[str, Any]) -> Responses:
    texts = record.get("responses")
    if not isinstance(texts, list) or len(texts) < 2:
        raise DataError(
            f"{where}: `responses` must be a list of two texts or more.", "Correct or remove the line."
        )
    numbered = {f"responses[{i}]": text for i, text in enumerate(texts)}
    return Responses(prompt_of(where, record), [text_of(where, numbered, key) for key in numbered])


def comparisons(index: int, example: Responses, first_wins: FirstWins) -> Iterator[JudgedPair]:
    """Every two different responses of `example`, judged; the same text twice counts once."""
    pairs = list(combinations(dict.fromkeys(example.responses), 2))
    verdicts = compare(first_wins, [(example.prompt, first, second) for first, second in pairs])
    for (first, second), verdict in zip(pairs, verdicts, strict=True):
        yield JudgedPair(index, example.prompt, first, second, verdict.win, verdict.place_bias)


def merge(parts: list[Path]) -> list[JudgedPair]:
    """The ranks' comparisons in the order of the prompts."""
    found = [JudgedPair(**json.loads(line)) for part in parts for line in part.open(encoding="utf-8")]
    return sorted(found, key=lambda comparison: comparison.index)


def totals(found: list[JudgedPair], minimum_margin: float, to: Path) -> dict[str, float | None]:
    """Write the preferences among `found` whose win probabilities differ by `minimum_margin`, and count.

    Returns comparisons, preferences, and the judge's mean place bias (None where nothing was compared).
    """
    clear = [c for c in found if c.win != 0.5 and abs(2 * c.win - 1) >= minimum_margin]
    pairs = [
        Preference(c.prompt, c.first, c.second) if c.win > 0.5 else Preference(c.prompt, c.second, c.first)
        for c in clear
    ]
    to.parent.mkdir(parents=True, exist_ok=True)
    whole = to.with_name(f".{to.name}.part")
    write_preferences(whole, pairs, win_probability=[max(c.win, 1 - c.win) for c in clear])
    whole.replace(to)
    bias = sum(c.place_bias for c in found) / len(found) if found else None
    return {"comparisons": len(found), "preferences": len(pairs), "place_bias": bias}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
