"""How many features a converted model needs (auto-m): `python -m workloads.auto_features ATTEMPT.json`.

The exact model is converted with a first count of features, then with twice as many, until its gap to exact attention
on held-out text is within the tolerance; past the cap the run refuses with the gap at every count (docs/theory A.8).
Each count is a conversion of its own, from the exact model, by all of `training`: learned rows are drawn again, and
with random rows, too, the projections must learn their map. A count's checkpoints stand in CHECKPOINTS/count-COUNT, so
that an attempt goes on where the last one ended; the chosen one's newest is linked as the job's own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from escala.contract.attempt import stop_on_sigterm
from escala.contract.errors import ToleranceNotMet
from escala.contract.records import STOP_REASONS, AttemptSpec, Outcome, read_json
from escala.schema import AutoFeaturesConfig, get_workload
from escala.storage.checkpoints import list_checkpoints, open_checkpoints
from escala.tracking.lineage.lifecycle import LiveAttempt, RunSummary, run_attempt
from escala.tracking.tracker import Metric
from workloads.convert import prepare
from workloads.training.driver import fit
from workloads.training.entry import Prepared, WorkerInputs
from workloads.training.failures import NodeWatch, classify
from workloads.training.run import STOP_MESSAGES, choose_checkpoint, keep_tokenizer, summary

SPENT = (
    "attempt_tokens",
    "attempt_flops",
    "wall_seconds",
    "energy_joules",
    "cost_usd",
    "carbon_gco2e",
)  # of a run's record: what all counts together took


@dataclass
class Search:
    """The counts that were tried: count -> gap to exact attention, in nats per token."""

    tolerance_nats: float
    gaps: dict[int, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> int | None:
        """The smallest count within the tolerance."""
        return min((count for count, gap in self.gaps.items() if gap <= self.tolerance_nats), default=None)

    def __str__(self) -> str:
        return ", ".join(f"{count}: {gap:.4f}" for count, gap in self.gaps.items())

    def measures(self) -> dict[str, float]:
        """The gap at every count, and the chosen one."""
        found = {f"gap_at_{count}_nats": gap for count, gap in self.gaps.items()}
        return found if self.chosen is None else {**found, "chosen_count": float(self.chosen)}

    def add_spent(self, facts: Mapping[str, Any]) -> None:
        """Add what one training took; a number that it does not know is left out."""
        for key in SPENT:
            if facts.get(key) is not None:
                self.spent[key] = self.spent.get(key, 0.0) + facts[key]


def main(arguments: list[str]) -> int:
    """Run one attempt; returns the process's exit code."""
    return run_attempt(arguments, search, partial(classify, nodes=None))


def search(attempt: LiveAttempt) -> None:
    """Convert with one count after the other. Raises ToleranceNotMet, and what goes wrong."""
    import ray

    config = attempt.open(AutoFeaturesConfig.model_validate)
    prepared = prepare(attempt.spec, config)
    attempt.reads(prepared.fingerprints)
    found = Search(config.tolerance_nats)
    attempt.summarise = partial(summarise, found)
    ray.init(address="auto", log_to_driver=True, namespace="escala")
    stop_on_sigterm(attempt.files)
    attempt.classify = partial(classify, nodes=NodeWatch())
    for count in config.counts:
        spec = spec_of(attempt.spec, config, count, found)
        facts = convert(attempt, spec, prepared)
        found.add_spent(facts)
        if facts["outcome"] in STOP_REASONS:
            attempt.outcome = Outcome(facts["outcome"], STOP_MESSAGES[facts["outcome"]])
            return
        tell(attempt, found, count, facts["measures"]["gap_after_nats"])
        if found.chosen is not None:
            publish(spec, attempt.spec, prepared)
            return
    raise ToleranceNotMet(
        f"no features.count up to {config.counts[-1]} brings the gap to exact attention within "
        f"{config.tolerance_nats:g} nats per token (count: gap in nats): {found}",
        "raise tolerance_nats, max_count, or training.train_tokens; or convert to a window or keep exact attention, "
        "where the text needs recall",
    )


def spec_of(job: AttemptSpec, config: AutoFeaturesConfig, count: int, found: Search) -> AttemptSpec:
    """The conversion with `count` features, in the job's attempt, with what is left of its budgets."""
    flops, seconds = job.remaining_flops, job.remaining_seconds
    return replace(
        job,
        workload="convert",
        entry_point=get_workload("convert").entry_point,
        config=config.with_count(count).model_dump(mode="json"),
        checkpoints=f"{job.checkpoints}/count-{count}",
        resume_from=None,
        remaining_flops=None if flops is None else flops - found.spent.get("attempt_flops", 0.0),
        remaining_seconds=None if seconds is None else seconds - found.spent.get("wall_seconds", 0.0),
        metric_prefix=f"count_{count}/",
    )


def convert(attempt: LiveAttempt, spec: AttemptSpec, prepared: Prepared) -> dict[str, Any]:
    """Train one count's conversion; what its rank 0 says of it."""
    config = get_workload(spec.workload).parse(spec.config)
    found = choose_checkpoint(spec, config, prepared.fingerprints["tokenizer"])
    keep_tokenizer(prepared.tokenizer, open_checkpoints(spec.checkpoints), found)
    _, run_id = attempt.run
    address = None if found is None else found.address
    fit(WorkerInputs(spec, prepared.path, address, run_id, prepared.fingerprints))
    facts: dict[str, Any] = read_json(attempt.files.facts)
    return facts


def tell(attempt: LiveAttempt, found: Search, count: int, gap: float) -> None:
    """Note a count's gap: in the log, and as a metric whose steps are counts."""
    found.gaps[count] = gap
    print(f"features.count {count}: gap {gap:.4f} nats (tolerance {found.tolerance_nats:g})", flush=True)
    tracker, run_id = attempt.run
    tracker.metrics(run_id, [Metric("gap_by_count_nats", gap, count, time.time_ns() // 1_000_000)])


def publish(spec: AttemptSpec, job: AttemptSpec, prepared: Prepared) -> None:
    """Make the chosen conversion's checkpoints the job's own."""
    target = open_checkpoints(job.checkpoints)
    keep_tokenizer(prepared.tokenizer, target, None)
    for found in list_checkpoints(open_checkpoints(spec.checkpoints)):
        link = Path(target.address) / found.name
        link.unlink(missing_ok=True)
        os.symlink(Path(Path(spec.checkpoints).name) / found.name, link)


def summarise(found: Search, attempt: LiveAttempt) -> RunSummary:
    """The last conversion's record, with the gap at every count and what all of them took."""
    last = summary(attempt)
    measures = {**(last.values.get("measures") or {}), **found.measures()}
    return replace(last, values={**last.values, **found.spent, "measures": measures})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
