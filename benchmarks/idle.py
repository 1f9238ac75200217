"""What an idle escala costs: CPU-seconds a minute and memory of each process after `escala up`, nothing submitted.

    python benchmarks/idle.py [--seconds 300] [--jobs 5]

Starts an embedded cluster in an empty home of its own, waits until it has settled, measures; then submits jobs, one
after the other, to show how soon the reconcile loop claims each (the first waits for its import of Ray's client), and
measures again. Leaves nothing behind. Linux only: CPU time and memory come from /proc.

Memory is PSS (proportional set size): a page that n processes share counts 1/n in each, so that the sum is what ending
them would free. RSS counts it in each of them, libraries and forked interpreters above all; its sum is shown beside.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from submits import free_ports

from escala import Escala, cluster
from escala.managed import ray_directory
from escala.processes import Processes
from escala.settings import Settings

MOST_CPU_SECONDS_A_MINUTE = 3.0
MOST_BYTES = 2e9
LATEST_CLAIM_SECONDS = 1.0  # of a job that is submitted to an idle cluster; the loop looks every 0.5 s
STARTING_SECONDS = 120.0
WINDOW_SECONDS, SETTLED_RATIO = 15.0, 1.25  # settled: no window costs so much more than the next one
SETTLING_SECONDS = 240.0
JOB = ["model={vocab_size: 512, n_layers: 1, d_model: 32, n_heads: 1, max_context_tokens: 32}",
       "data={tokenizer: {vocab_size: 512}}", "training={steps: 1, batch_sequences: 1}"]  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """One process. `cpu_seconds`: user and system time of it and of its children that have ended."""

    title: str
    cpu_seconds: float
    pss_bytes: int
    rss_bytes: int


@dataclass(frozen=True)
class Row:
    """All processes of one title, over a time of being idle."""

    title: str
    processes: int
    cpu_seconds_a_minute: float
    pss_bytes: int
    rss_bytes: int


def main() -> int:
    """Start, settle, measure, submit, clean up; 1 above a floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="how long to measure")
    parser.add_argument("--jobs", type=int, default=5, help="submitted after that")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="escala-idle-"))
    ray_port, dashboard_port, mlflow_port = free_ports(3)
    ports = {"ray_port": ray_port, "ray_dashboard_port": dashboard_port, "mlflow_port": mlflow_port}
    settings = Settings(home=home, ray_address=None, ESCALA_TRACKING_URI=None, **ports)
    begun = time.monotonic()
    try:
        cluster.up(settings, print)
        settle(settings)
        print(
            f"settled {time.monotonic() - begun:.0f} s after `escala up`; measuring {options.seconds:.0f} s"
        )
        rows = measure(settings, options.seconds)
        show(rows)
        if not options.jobs:
            return int(above_floor(rows))
        jobs = range(1, options.jobs + 1)
        claims, starts = zip(
            *(waits_of_a_job(settings, number, number < options.jobs) for number in jobs), strict=True
        )
        print(f"{options.jobs} jobs, one after the other: claimed {spread(claims)} after their submission")
        print(
            f"(floor of the median: {LATEST_CLAIM_SECONDS} s), their drivers seen {spread(starts)} after it"
        )
        settle(settings)
        print("idle again after these jobs (no floor):")
        show(measure(settings, options.seconds))
        return int(above_floor(rows) or statistics.median(claims) > LATEST_CLAIM_SECONDS)
    finally:
        cluster.down(settings)
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(ray_directory(settings).parent, ignore_errors=True)


def settle(settings: Settings) -> None:
    """Wait until the processes are the same over two windows, and cost no less in the second."""
    deadline = time.monotonic() + SETTLING_SECONDS
    before, spent_before = usages(settings), float("inf")
    while True:
        time.sleep(WINDOW_SECONDS)
        now = usages(settings)
        spent = cpu_seconds(now.values()) - cpu_seconds(before.values())
        if now.keys() == before.keys() and spent_before <= SETTLED_RATIO * spent:
            return
        if time.monotonic() > deadline:
            raise SystemExit(
                f"not settled within {SETTLING_SECONDS:.0f} s: {spent:.2f} CPU-seconds in a window"
            )
        before, spent_before = now, spent


def measure(settings: Settings, seconds: float) -> list[Row]:
    """What each process costs over `seconds`, the dearest first; memory is that of the end."""
    before, begun = usages(settings), time.monotonic()
    time.sleep(seconds)
    after, minutes = usages(settings), (time.monotonic() - begun) / 60
    grouped: dict[str, list[int]] = defaultdict(list)
    for pid, usage in after.items():
        grouped[usage.title].append(pid)
    rows = []
    for title, pids in grouped.items():
        spent = sum(
            after[pid].cpu_seconds - (before[pid].cpu_seconds if pid in before else 0.0) for pid in pids
        )
        pss, rss = (sum(getattr(after[pid], name) for pid in pids) for name in ("pss_bytes", "rss_bytes"))
        rows.append(Row(title, len(pids), spent / minutes, pss, rss))
    # Ended meanwhile: what they had spent before counts in the parent that waited for them.
    if gone := [usage for pid, usage in before.items() if pid not in after]:
        rows.append(Row("(ended meanwhile)", 0, -cpu_seconds(gone) / minutes, 0, 0))
    return sorted(rows, key=lambda row: -row.cpu_seconds_a_minute)


def usages(settings: Settings) -> dict[int, Usage]:
    """Every process that carries this home's mark, by pid."""
    processes = Processes(settings.home)
    found = {}
    for name in cluster.NAMES:
        for process in processes.marked(name):
            try:
                found[process.pid] = usage_of(name, process)
            except (psutil.Error, OSError):  # just gone
                continue
    return found


def usage_of(name: str, process: psutil.Process) -> Usage:
    """Raises psutil.Error, OSError for one that is gone."""
    times = process.cpu_times()
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    sizes = {key: 1024 * int(number) for key, number in re.findall(r"^(Pss|Rss):\s+(\d+) kB$", rollup, re.M)}
    spent = times.user + times.system + times.children_user + times.children_system
    return Usage(f"{name}: {title_of(process.name(), process.cmdline())}", spent, sizes["Pss"], sizes["Rss"])


def title_of(name: str, command: list[str]) -> str:
    """What a process is, in a few words: its module, script or program; of Ray's, the name that it gave itself, of
    which the kernel keeps 15 characters.
    """
    if name.startswith("ray"):
        return name
    if "-m" in command:
        return command[command.index("-m") + 1]
    words = [word for word in command if not word.startswith("-")]
    scripts = [Path(word).name for word in words[1:] if word.endswith(".py")]
    if "-c" in command:
        return " ".join(re.findall(r"import (\w+|\w+ import \w+)", " ".join(command))) or "python -c"
    return (scripts[-1] if scripts else Path(words[0]).name if words else "?").split(" ")[0]


def cpu_seconds(usages: Iterable[Usage]) -> float:
    """Of all of them."""
    return sum(usage.cpu_seconds for usage in usages)


def totals(rows: Iterable[Row]) -> Mapping[str, float]:
    """Sums over all rows, by field."""
    names = ("processes", "cpu_seconds_a_minute", "pss_bytes", "rss_bytes")
    return {name: sum(getattr(row, name) for row in rows) for name in names}


def show(rows: list[Row]) -> None:
    """The table, its sum and the floors."""
    total = totals(rows)
    lines = [*rows, Row("all", int(total["processes"]), total["cpu_seconds_a_minute"],
                        int(total["pss_bytes"]), int(total["rss_bytes"]))]  # fmt: skip
    print(f"{'process':48} {'number':>6} {'CPU-s/min':>9} {'PSS, MB':>8} {'RSS, MB':>8}")
    for row in lines:
        sizes = f"{row.pss_bytes / 1e6:8.0f} {row.rss_bytes / 1e6:8.0f}"
        print(f"{row.title:48.48} {row.processes:6} {row.cpu_seconds_a_minute:9.2f} {sizes}")
    print(f"{'floor':48} {'':6} {MOST_CPU_SECONDS_A_MINUTE:9.2f} {MOST_BYTES / 1e6:8.0f}")


def above_floor(rows: list[Row]) -> bool:
    """Whether it costs more than it may."""
    total = totals(rows)
    return total["cpu_seconds_a_minute"] > MOST_CPU_SECONDS_A_MINUTE or total["pss_bytes"] > MOST_BYTES


def spread(seconds: Sequence[float]) -> str:
    """Median and largest."""
    return f"{statistics.median(seconds):.2f} s (median; at most {max(seconds):.2f} s)"


def waits_of_a_job(settings: Settings, number: int, stop: bool) -> tuple[float, float]:
    """Submit a job, wait until its driver runs, stop it or let it end. Seconds from its submission until the reconcile
    loop has claimed it, and until that has seen its driver.
    """
    escala = Escala(settings)
    job = escala.submit("pretrain", overrides=JOB, options={"name": f"idle-{number}"})
    deadline = time.monotonic() + STARTING_SECONDS
    while not (attempts := escala.job(job.id).attempts) or (running_at := attempts[0].running_at) is None:
        if time.monotonic() > deadline:
            raise SystemExit(
                f"{job.id} does not run after {STARTING_SECONDS:.0f} s: {escala.job(job.id).job}"
            )
        time.sleep(0.05)
    if stop:
        escala.stop(job.id)
    while (state := escala.job(job.id).job.state) not in ("stopped", "failed", "succeeded"):
        time.sleep(0.2)
    if state == "failed" or (state == "stopped") != stop:
        raise SystemExit(f"{job.id} is {state}: {escala.job(job.id).job.message}")
    return attempts[0].claimed_at - job.submitted_at, running_at - job.submitted_at


if __name__ == "__main__":
    sys.exit(main())
