"""Where attempts run: the `Backend` protocol, and Ray's job server behind it.

Submission ids are deterministic (JOB-ATTEMPT), so that asking twice starts once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from escala.contract.errors import ClusterError

Status = Literal["absent", "pending", "running", "ended"]
T = TypeVar("T")
TIMEOUT_SECONDS = (5, 30)  # to connect, to answer: a head that hangs must not hang the reconcile loop


class Backend(Protocol):
    """Starts a command under an id, at most once. All but `reachable` raise ClusterError."""

    def reachable(self) -> bool:
        """Whether it answers now."""
        ...

    def submit(
        self, submission_id: str, entrypoint: str, env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Start `entrypoint` (a shell command) in the runtime_env `env`, unless it has the id already."""
        ...

    def status(self, submission_id: str) -> Status:
        """ "absent": it has never heard of the id, or has been restarted since."""
        ...

    def kill(self, submission_id: str) -> None:
        """End the command: SIGTERM, then SIGKILL. Nothing happens if it is absent or has ended."""
        ...


def entry_command(entry_point: str, spec: Path, log: Path, python: str = sys.executable) -> str:
    """The shell command of an attempt. Output goes to our own log, which outlives the head."""
    words = " ".join(shlex.quote(word) for word in (python, "-u", "-m", entry_point, str(spec)))
    return f"echo {shlex.quote(f'the log is {log}')}; exec {words} >> {shlex.quote(str(log))} 2>&1"


class RayBackend:
    """Ray's job server.

    Args:
        address: the dashboard's, http://HOST:PORT; or what finds it again: a restarted head may have moved.
    """

    def __init__(self, address: str | Callable[[], str]) -> None:
        self._address = address if callable(address) else lambda: address
        self._client: Any = None

    def reachable(self) -> bool:
        """Whether the job server answers."""
        try:
            self._call(lambda client: client.get_version())
        except ClusterError:
            return False
        return True

    def submit(
        self, submission_id: str, entrypoint: str, env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """See Backend."""

        def ask(client: Any) -> None:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env=dict(env),
                metadata=dict(metadata),
            )

        try:
            self._call(ask)
        except ClusterError:
            if self.status(submission_id) == "absent":  # else it has the id: an earlier answer was lost
                raise

    def status(self, submission_id: str) -> Status:
        """See Backend."""
        state = self._call(lambda client: client.get_job_status(submission_id), absent="absent")
        if state == "absent":
            return "absent"
        words: dict[str, Status] = {"PENDING": "pending", "RUNNING": "running"}
        return words.get(state.value, "ended")

    def kill(self, submission_id: str) -> None:
        """See Backend."""
        self._call(lambda client: client.stop_job(submission_id), absent=None)

    def _call(self, ask: Callable[[Any], Any], **absent: Any) -> Any:
        """Ask the job server; `absent=VALUE` is the answer for an id that it does not know."""
        import requests

        try:
            if self._client is None:
                self._client = _client(self._address())
            return ask(self._client)
        except (RuntimeError, ConnectionError, requests.RequestException) as error:
            if absent and "status code 404" in str(error):
                return absent["absent"]
            self._client = None  # the next call connects again: the head may come back elsewhere
            raise ClusterError(
                f"Ray's job server does not serve us: {str(error).strip().splitlines()[-1]}",
                "`escala status` shows the cluster; `escala up` restarts it",
            ) from error


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray is untyped to us
        """With time limits: Ray's own client waits forever."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **({"timeout": TIMEOUT_SECONDS} | options))

    return Client(address)
