"""The runner: the reconcile loop as a process of `escala up`. `python -m escala.jobs.runner`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from escala.contract.errors import ClusterError, EscalaError
from escala.contract.files import no_room
from escala.contract.redaction import hide_in_logs
from escala.jobs.reconcile import Reconciler, Timing
from escala.jobs.records import Job
from escala.jobs.store import JobStore
from escala.storage import user_code
from escala.storage.locks import locked

if TYPE_CHECKING:
    from escala.settings import Settings

log = logging.getLogger("escala.runner")


ENSURE_SECONDS = 2.0  # how soon a dead head or tracker is noticed
LAWS_SECONDS = 60.0  # how often laws' runs are looked at whose clients died


def run(
    reconciler: Reconciler,
    ensure: Callable[[], object],
    ending: threading.Event,
    timing: Timing = Timing(),
) -> None:
    """Step until `ending` is set. Beside it, since either may take long and must hold no job up: tracking is
    delivered, and `ensure` restarts what died of the embedded cluster.
    """
    for name, act, interval in (
        ("delivery", reconciler.deliver, timing.interval),
        ("ensure", ensure, ENSURE_SECONDS),
    ):
        threading.Thread(target=_repeat, args=(act, ending, interval), name=name, daemon=True).start()
    _repeat(reconciler.step, ending, timing.interval)


def _repeat(act: Callable[[], None], ending: threading.Event, interval: float) -> None:
    said = ""
    while not ending.is_set():
        try:
            act()
            said = ""
        except Exception as error:
            if repr(error) != said:  # for example a database that is away, or a full disk
                if isinstance(error, EscalaError) or no_room(error):
                    log.warning("it waits, and tries again: %s", error)
                else:
                    log.exception("a step failed; it is tried again")
            said = repr(error)
        ending.wait(interval)


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the lock that makes this process the home's only runner. Raises ClusterError where it is taken."""
    path = home / "run" / "runner.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, wait=False) as held:
        if not held:
            holder = path.read_text(errors="replace").strip() or "unknown"
            raise ClusterError(f"another runner (process {holder}) serves {home}", "`escala status` shows it")
        path.write_text(str(os.getpid()))  # what another one is told; the lock is the kernel's
        yield


def main() -> int:
    """The process: settings from the environment, log lines to stdout, SIGTERM or SIGINT ends it cleanly."""
    from escala.settings import Settings

    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=form)
    hide_in_logs()
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    try:
        settings = Settings()
        with only_one(settings.home):
            store = JobStore(settings.database_url, home=settings.home)
            threading.Thread(target=_end_laws, args=(settings, ending), name="laws", daemon=True).start()
            run(_reconciler(settings, store), lambda: _restart_dead(settings), ending)
            store.close()
    except EscalaError as error:
        log.error("%s", error)
        return error.exit_code
    log.info("the runner ends")
    return 0


def _end_laws(settings: Settings, ending: threading.Event) -> None:
    """Now and then end the laws' runs of clients that died; not at once, since a start has enough to do."""
    from escala.laws.queries import close_abandoned

    if not ending.wait(LAWS_SECONDS):
        _repeat(partial(close_abandoned, settings), ending, LAWS_SECONDS)


def _restart_dead(settings: Settings) -> None:
    from escala.cluster import ensure

    for name in ensure(settings):
        log.warning("%s was dead and has been restarted", name)


def _judge_run(settings: Settings, directory: Path) -> bool:
    """Compare the run of an attempt that has ended with the champions, and score its sealed forecasts; true where its
    spool got tags.
    """
    from escala.laws.drift import compare_run
    from escala.laws.forecasts import experiment_of, score_run

    scored = score_run(settings.home, settings.tracker, experiment_of(settings), directory)
    return compare_run(settings.home, settings.tracker, directory) or bool(scored)


def _reconciler(settings: Settings, store: JobStore) -> Reconciler:
    from escala.hardware import load_cluster
    from escala.jobs.backends import open_backend
    from escala.runtime_env import job_variables
    from escala.tracking.children import FamilyDelivery
    from escala.tracking.delivery import Delivery

    ray_address = settings.ray_address or f"127.0.0.1:{settings.ray_port}"
    tracking_uri = settings.tracking_uri or f"http://127.0.0.1:{settings.mlflow_port}"
    delivery = FamilyDelivery(Delivery(tracking_uri), settings.home, partial(_judge_run, settings))

    def environment(job: Job) -> Mapping[str, str]:
        resources = job.config.get("resources") or job.config.get("base", {}).get(
            "resources", {}
        )  # or a sweep's
        threads, gpus = resources.get("threads_per_worker", 1), resources.get("gpus_per_worker", 0) > 0
        digest = job.tags.get(user_code.TAG)
        code = user_code.directory(settings.home, digest) if digest else None
        one_node = settings.ray_address is None
        return job_variables(ray_address, threads, gpus, tracking_uri, code=code, one_node=one_node)

    return Reconciler(
        store,
        open_backend(load_cluster(settings.cluster).backend, settings),
        settings.home,
        environment,
        settings.max_running_jobs,
        delivery.deliver,
        time.time,
        ticks=time.monotonic,
    )


if __name__ == "__main__":
    sys.exit(main())
