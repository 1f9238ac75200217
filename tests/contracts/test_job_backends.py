"""What each backend of jobs promises: one in memory, and Ray's job server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from escala.contract.errors import ClusterError, SpecError
from escala.jobs import backends
from escala.jobs.backends import BACKENDS, open_backend
from escala.jobs.backends.base import JobBackend, Submission
from escala.runtime_env import job_variables
from escala.settings import Settings
from tests.conftest import wait_for
from tests.memory_backend import MemoryBackend

ENTRY_POINT = "tests.contracts.waiting_attempt"


class Place(Protocol):
    """A backend, and the test's hand on what runs there."""

    backend: JobBackend
    away: JobBackend  # one that does not answer
    variables: dict[str, str]  # that its attempts need

    def started(self, submission: Submission) -> int:
        """How often the attempt was started."""
        ...

    def end(self, submission: Submission) -> None:
        """Let the attempt end by itself."""
        ...


class Memory:
    def __init__(self) -> None:
        self.backend, self.away = MemoryBackend(), MemoryBackend(up=False)
        self.variables = {}

    def started(self, submission: Submission) -> int:
        if self.backend.drivers.get(submission.id) == "pending":
            self.backend.drivers[submission.id] = "running"
        return self.backend.submissions.count(submission.id)

    def end(self, submission: Submission) -> None:
        self.backend.drivers[submission.id] = "ended"


class Ray:
    def __init__(self, settings: Settings) -> None:
        self.backend = open_backend("ray", settings)
        self.away = open_backend("ray", settings.model_copy(update={"ray_dashboard": "http://127.0.0.1:9"}))
        self.variables = job_variables(settings.gcs_address)

    def started(self, submission: Submission) -> int:
        path = submission.spec.with_suffix(".started")
        lines = path.read_text().splitlines() if path.exists() else []
        assert all(json.loads(line).items() >= submission.variables.items() for line in lines)
        assert not lines or submission.log.read_text() == "it runs\n"
        return len(lines)

    def end(self, submission: Submission) -> None:
        submission.spec.with_suffix(".end").touch()


@pytest.fixture(
    params=["memory", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])], scope="module"
)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "memory":
        yield Memory()
        return
    from escala.cluster import connection

    request.getfixturevalue("cluster")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in connection(Settings()).environment.items():
            patch.setenv(name, value)
        yield Ray(Settings())


@pytest.fixture
def submission(place: Place, tmp_path: Path) -> Submission:
    variables = {**place.variables, "ESCALA_TEST": "a b"}
    return Submission(tmp_path.name, ENTRY_POINT, tmp_path / "it's.json", tmp_path / "log.txt", variables)


def test_an_attempt_starts_once_and_ends(place, submission):
    backend = place.backend
    assert backend.reachable()
    assert backend.status(submission.id) == "absent"
    backend.stop(submission.id)
    for _ in range(2):
        backend.submit(submission)
        assert backend.status(submission.id) in ("pending", "running")
    wait_for(lambda: place.started(submission), 60, "it starts")
    wait_for(lambda: backend.status(submission.id) == "running", 10, "it is seen at work")
    backend.submit(submission)
    place.end(submission)
    wait_for(lambda: backend.status(submission.id) == "ended", 30, "its end is seen")
    backend.stop(submission.id)
    backend.submit(submission)  # the id is used up
    assert (backend.status(submission.id), place.started(submission)) == ("ended", 1)


def test_an_attempt_is_stopped(place, submission):
    place.backend.submit(submission)
    wait_for(lambda: place.started(submission), 60, "it starts")
    place.backend.stop(submission.id)
    wait_for(lambda: place.backend.status(submission.id) == "ended", 30, "it is ended")


def test_one_that_does_not_answer_says_so(place, submission):
    assert not place.away.reachable()
    for ask in (place.away.submit, lambda s: place.away.status(s.id), lambda s: place.away.stop(s.id)):
        with pytest.raises(ClusterError):
            ask(submission)


def test_an_unknown_backend_is_refused():
    with pytest.raises(SpecError, match="no backend 'slurm'") as refused:
        open_backend("slurm", Settings())
    assert all(name in refused.value.hint for name in BACKENDS)


def test_one_module_imports_rays_job_client():
    package = Path(backends.__file__).parents[2]
    found = [p.relative_to(package) for p in package.rglob("*.py") if "job_submission" in p.read_text()]
    assert found == [Path("jobs/backends/ray.py")]
