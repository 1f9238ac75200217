"""The job's state machine: every rule of its prose, and that nothing else may happen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from escala.contract.errors import StateError
from escala.jobs.state import (
    ACTIVE,
    ATTEMPTS_CAP,
    FINAL,
    STATES,
    AttemptEnded,
    BudgetOverrun,
    BudgetSpent,
    BudgetUse,
    Claimed,
    DependencyEnded,
    DriverSeen,
    JobStanding,
    Queued,
    RetryRequested,
    StopRequested,
    budget_spent,
    next_to_start,
    remaining,
    transition,
)

LEGAL = {
    Claimed(): {"queued"},
    DriverSeen(): {"starting"},
    StopRequested(): {"queued", "starting", "running"},
    RetryRequested(): {"failed", "stopped"},
    BudgetOverrun(): {"starting", "running"},
    BudgetSpent("all of it"): {"queued"},
    DependencyEnded("j2", "failed"): {"queued"},
    AttemptEnded("succeeded"): set(ACTIVE),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", LEGAL, ids=lambda e: type(e).__name__)
def test_what_is_not_in_the_prose_is_refused(event, state):
    job = JobStanding("j1", state, attempts=1)
    if state in LEGAL[event]:
        assert transition(job, event, 7.0).at == 7.0
    else:
        with pytest.raises(StateError, match=f"j1 is (already )?{state}"):
            transition(job, event, 7.0)


def test_a_claim_numbers_the_attempt():
    decision = transition(JobStanding("j1", "queued", attempts=2), Claimed(), 0)
    assert (decision.state, decision.attempt) == ("starting", 3)


def test_a_broken_dependency_is_named():
    decision = transition(JobStanding("j1", "queued"), DependencyEnded("j2", "stopped"), 0)
    assert (decision.state, decision.reason) == ("failed", "dependency")
    assert "j2" in decision.message
    assert "stopped" in decision.message


@pytest.mark.parametrize("state", ACTIVE)
@pytest.mark.parametrize(
    "kind", ["user_error", "out_of_memory", "diverged", "superseded", "internal", "newer_word"]
)
def test_what_would_fail_again_is_not_retried(kind, state):
    decision = transition(JobStanding("j1", state, attempts=1, retries=5), AttemptEnded(kind, "why"), 0)
    assert (decision.state, decision.reason, decision.message) == ("failed", kind, "why")


@pytest.mark.parametrize("kind", ["worker_lost", "node_lost", "driver_lost"])
def test_a_lost_attempt_is_retried_while_retries_are_left(kind):
    again = transition(JobStanding("j1", "running", 1, retries=1, retries_used=0), AttemptEnded(kind), 0)
    assert (again.state, again.reason, again.uses_retry) == ("queued", kind, True)
    out = transition(
        JobStanding("j1", "running", 2, retries=1, retries_used=1), AttemptEnded(kind, "gone"), 0
    )
    assert (out.state, out.reason, out.message) == ("failed", kind, "gone (no retry left of 1)")


def test_a_preemption_uses_up_no_retry_but_is_bounded():
    again = transition(JobStanding("j1", "running", 5, retries=0), AttemptEnded("preempted"), 0)
    assert (again.state, again.uses_retry) == ("queued", False)
    assert (
        transition(JobStanding("j1", "running", ATTEMPTS_CAP), AttemptEnded("preempted"), 0).state == "failed"
    )


@pytest.mark.parametrize("reason", ["user", "budget"])
@pytest.mark.parametrize("kind", ["worker_lost", "driver_lost", "preempted"])
def test_a_stopping_job_that_is_lost_is_stopped(kind, reason):
    job = JobStanding("j1", "stopping", 1, retries=3, stop_reason=reason)
    assert transition(job, AttemptEnded(kind), 0).state == "stopped"
    assert transition(job, AttemptEnded(kind), 0).reason == reason
    assert transition(job, AttemptEnded("succeeded"), 0).state == "succeeded"


@pytest.mark.parametrize("reason", ["user", "budget"])
def test_a_clean_early_end_is_a_stop(reason):
    decision = transition(JobStanding("j1", "running", 1), AttemptEnded(reason), 0)
    assert (decision.state, decision.reason) == ("stopped", reason)


def test_the_queue_goes_by_priority_then_order_within_the_limit():
    queue = [Queued("late", 50, 3), Queued("early", 50, 1), Queued("urgent", 90, 4), Queued("lazy", 0, 0)]
    assert [job.id for job in next_to_start(queue, 1, 4)] == ["urgent", "early", "late"]
    assert next_to_start(queue, 4, 4) == []
    assert next_to_start(queue, 9, 4) == []


def test_a_budget_sums_what_was_reported():
    assert budget_spent(None, None, BudgetUse(1e30, 1e9)) is None
    assert budget_spent(10.0, 10.0, BudgetUse(None, None)) is None
    assert budget_spent(10.0, None, BudgetUse(9.0, None)) is None
    assert "10 FLOPs of 10" in (budget_spent(10.0, None, BudgetUse(10.0, None)) or "")
    assert "12.0 s of 10.0 s" in (budget_spent(None, 10.0, BudgetUse(None, 12.0)) or "")
    assert (remaining(None, 3.0), remaining(5.0, None), remaining(5.0, 7.0)) == (None, 5.0, 0.0)


EVENTS = st.sampled_from(
    [*LEGAL, *(AttemptEnded(k) for k in ("worker_lost", "preempted", "diverged", "user"))]
)


@given(st.lists(EVENTS, max_size=60), st.integers(0, 3))
def test_no_history_makes_more_attempts_than_retries_allow(events, retries):
    """Without preemptions and user retries: at most retries + 1 attempts, and success is final."""
    job = JobStanding("j1", "queued", retries=retries)
    for event in events:
        if event in (RetryRequested(), AttemptEnded("preempted")):
            continue
        try:
            decision = transition(job, event, 0)
        except StateError:
            continue
        assert job.state not in FINAL
        stop = decision.reason if decision.state == "stopping" else None
        used = job.retries_used + decision.uses_retry
        job = JobStanding("j1", decision.state, decision.attempt or job.attempts, retries, used, stop)
        assert job.attempts <= retries + 1
