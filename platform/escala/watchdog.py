"""The watchdog: starts the reconcile loop again when it died. `python -m escala.watchdog`, a process of `escala up`.

The loop in turn starts this process again, as it does with Ray and MLflow (`cluster.ensure`): each of the two has the
other to watch it. Both act under HOME/run/lock, and only while HOME/run/wanted is there, so that neither brings back
what `escala down` stops. Small, since it only waits: no pydantic, ray or database here. Its environment is the loop's.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from escala.contract.errors import EscalaError
from escala.processes import PROCESS_KEY, Command, Processes

log = logging.getLogger("escala.watchdog")
RUNNER = "runner"
RUNNER_ARGUMENTS = (sys.executable, "-m", "escala.jobs.runner")
LOOK_SECONDS = 1.0
LONGEST_WAIT_SECONDS, LASTING_SECONDS = 16.0, 60.0  # between two starts; a loop that lived so long is well


class Watchdog:
    """Keeps the reconcile loop of `processes` alive. The first start is at once; one that ends soon again waits
    longer each time, up to LONGEST_WAIT_SECONDS.

    Args:
        command: how to start it.
    """

    def __init__(self, processes: Processes, command: Command) -> None:
        self._processes, self._command = processes, command
        self._started_at, self._wait = -LASTING_SECONDS, 0.0

    def look(self) -> bool:
        """Start the loop if it is dead and shall run. True where it was started."""
        now = time.monotonic()
        if not self._dead() or now < self._started_at + self._wait:
            return False
        with self._processes.lock(wait=False) as held:
            if not held or not self._dead():
                return False
            soon = now - self._started_at < LASTING_SECONDS
            self._wait = min(max(1.0, 2 * self._wait), LONGEST_WAIT_SECONDS) if soon else 0.0
            self._started_at = now
            record = self._processes.launch(self._command)
        log.warning("the reconcile loop was dead and has been restarted, as process %d", record.pid)
        return True

    def _dead(self) -> bool:
        return self._processes.wanted() and self._processes.alive(self._command.name) is None


def main() -> int:
    """The process: SIGTERM or SIGINT ends it."""
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=form)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    command = Command(RUNNER, RUNNER_ARGUMENTS, {}, lambda: True, key=os.environ[PROCESS_KEY])
    watchdog, said = Watchdog(Processes(Path(os.environ["ESCALA_HOME"])), command), ""
    while not ending.wait(LOOK_SECONDS):
        try:
            watchdog.look()
            said = ""
        except (EscalaError, OSError) as error:  # a full disk, for one: it tries again
            if str(error) != said:
                log.warning("the reconcile loop cannot be started: %s", error)
            said = str(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
