"""Ray's job server (the Ray Jobs API). The only module that imports its client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from escala.contract.errors import ClusterError
from escala.jobs.backends.base import Status, Submission
from escala.runtime_env import runtime_env
from escala.settings import Settings

TIMEOUT_SECONDS = (5, 30)  # to connect, to answer: a head that hangs must not hang the reconcile loop


class RayJobBackend:
    """Attempts as Ray jobs. Implements JobBackend.

    Args:
        address: of the dashboard, http://HOST:PORT.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._client: Any = None

    @classmethod
    def of(cls, settings: Settings) -> RayJobBackend:
        """That of the cluster in the settings."""
        return cls(settings.ray_dashboard)

    def reachable(self) -> bool:
        """Whether the job server answers."""
        try:
            self._call(lambda client: client.get_version())
        except ClusterError:
            return False
        return True

    def submit(self, submission: Submission) -> None:
        """See JobBackend."""

        def ask(client: Any) -> None:
            client.submit_job(
                entrypoint=submission.command(),
                submission_id=submission.id,
                runtime_env=runtime_env(submission.variables),
                metadata=dict(submission.labels),
            )

        try:
            self._call(ask)
        except ClusterError:
            if self.status(submission.id) == "absent":  # else it has the id: an earlier answer was lost
                raise

    def status(self, submission_id: str) -> Status:
        """See JobBackend."""
        state = self._call(lambda client: client.get_job_status(submission_id), absent="absent")
        if state == "absent":
            return "absent"
        words: dict[str, Status] = {"PENDING": "pending", "RUNNING": "running"}
        return words.get(state.value, "ended")

    def stop(self, submission_id: str) -> None:
        """See JobBackend."""
        self._call(lambda client: client.stop_job(submission_id), absent=None)

    def _call(self, ask: Callable[[Any], Any], **absent: Any) -> Any:
        """Ask the job server; `absent=VALUE` is the answer for an id that it does not know."""
        import requests

        try:
            if self._client is None:
                self._client = _client(self._address)
            return ask(self._client)
        except (RuntimeError, ConnectionError, requests.RequestException) as error:
            if absent and "status code 404" in str(error):
                return absent["absent"]
            self._client = None  # the next call connects again: the head may have been restarted
            raise ClusterError(
                f"Ray's job server does not serve us: {str(error).strip().splitlines()[-1]}",
                "`escala status` shows the cluster; `escala up` restarts it",
            ) from error


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray is untyped to us
        """With time limits: Ray's own client waits indefinitely."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **({"timeout": TIMEOUT_SECONDS} | options))

    return Client(address)
