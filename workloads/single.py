"""One attempt of a workload that trains nothing (bench, judge): tracker run, record, outcome, as training/run.py has
them for those that train.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from escala.contract.attempt import finish, flatten, read_attempt
from escala.contract.errors import EscalaError
from escala.contract.records import AttemptSpec, Outcome, RunRecord, to_plain
from escala.tracking.lineage import code_fingerprint, fingerprint
from escala.tracking.lineage.notes import NOTE_TAG, run_note, start_tags
from escala.tracking.tracker import Tracker, open_tracker

Found = TypeVar("Found")


def main(
    arguments: list[str], work: Callable[[AttemptSpec], Found], keep: Callable[[Tracker, str, Found], None]
) -> int:
    """Run one attempt; returns the process's exit code.

    Args:
        work: what the attempt is there for. Whatever it raises is in the outcome.
        keep: gives what it found to the tracker's run.
    """
    try:
        spec = read_attempt(arguments)
    except EscalaError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    started_at = time.time()
    tracker, key = open_tracker(spec.tracking_uri), spec.run_key or f"{spec.job_id}-{spec.attempt}"
    own = {"escala.job_id": spec.job_id, "escala.workload": spec.workload, **start_tags(spec)}
    tags = spec.tags | own
    run_id = tracker.start(key, spec.experiment, spec.name, tags, flatten(spec.config))
    try:
        keep(tracker, run_id, work(spec))
    except Exception as error:  # noqa: BLE001  whatever happened, the outcome says so
        from workloads.training.failures import classify

        traceback.print_exception(error)
        failure = classify(error, None)
        outcome, code = Outcome(failure.kind, failure.message, failure.hint), int(failure.exit_code)
    else:
        outcome, code = Outcome("succeeded"), 0
    record = RunRecord(
        run_id=run_id,
        job_id=spec.job_id,
        attempt=spec.attempt,
        name=spec.name,
        workload=spec.workload,
        status=outcome.kind,
        started_at=started_at,
        ended_at=time.time(),
        wall_seconds=time.time() - started_at,
        workers=spec.config.get("resources", {}).get("workers"),
        config_fingerprint=fingerprint(spec.config),
        code_fingerprint=code_fingerprint().fingerprint,
        reason=outcome.message or None,
    )
    known = {k: v for k, v in to_plain(record).items() if v is not None}
    note = run_note(spec, record, hint=outcome.hint)
    tracker.tags(run_id, {"escala.record": json.dumps(known, sort_keys=True), NOTE_TAG: note})
    tracker.finish(run_id, "FINISHED" if code == 0 else "FAILED")
    tracker.drain()
    finish(spec, Outcome(outcome.kind, outcome.message, outcome.hint, None, to_plain(record)))
    return code
