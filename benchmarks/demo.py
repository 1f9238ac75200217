"""`escala demo law` again and again, each in an empty home with a seed of its own: is the law healthy, does the planned
run fall into its sealed interval, how wide is that, how far off is the prediction, how long does it take?

    python benchmarks/demo.py [--seeds 0 1 2 3 4 5 6 7 8 9] [--busy 3] [--minutes 6] [--to DIRECTORY]

The last `--busy` of the seeds run beside two processes that do nothing but compute. Each home has its own ports and is
removed afterwards; what each demo printed and its forecast stay in `--to`, where a seed that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from submits import escala, free_ports

FEWEST_HEALTHY, FEWEST_INSIDE = 0.9, 0.8  # of the seeds
WIDEST, LARGEST_ERROR = 0.12, 0.03  # relative, medians
QUIET_SECONDS, BUSY_SECONDS = 360.0, 720.0
BUSY_PROCESSES = 2


@dataclass(frozen=True)
class Demo:
    """One demo. `error`, `width`: relative to the prediction; None where no run was predicted."""

    seed: int
    busy: bool
    seconds: float
    ended: int  # the exit status
    healthy: bool
    inside: bool | None
    error: float | None
    width: float | None
    factor: float | None  # the planned run's compute over the largest trial's
    run_id: str | None


def main() -> int:
    """Run the demos, print a line each and the floors; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--busy", type=int, default=3, help="of the seeds, the last ones")
    parser.add_argument("--minutes", type=float, default=6.0, help="of the demo")
    parser.add_argument("--to", type=Path, default=Path("demo-results"), help="what each demo printed")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    found = []
    for number, seed in enumerate(options.seeds):
        busy = number >= len(options.seeds) - options.busy
        demo = kept(options.to / f"seed-{seed}.json", seed, busy, options.minutes)
        print(demo, flush=True)
        found.append(demo)
    return int(missed(found))


def kept(path: Path, seed: int, busy: bool, minutes: float) -> Demo:
    """The demo of `path`, run where it is not there."""
    if not path.exists():
        with busy_cores(BUSY_PROCESSES if busy else 0):
            demo, printed = run(seed, busy, minutes)
        path.with_suffix(".txt").write_text(printed)
        path.write_text(json.dumps(asdict(demo)))
    return Demo(**json.loads(path.read_text()))


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(seed: int, busy: bool, minutes: float) -> tuple[Demo, str]:
    """One demo in an empty home, and what it printed."""
    home = Path(tempfile.mkdtemp(prefix="escala-demo-"))
    environment = os.environ | {"ESCALA_HOME": str(home)}
    for name, port in zip(("RAY", "RAY_DASHBOARD", "MLFLOW"), free_ports(3), strict=True):
        environment[f"ESCALA_{name}_PORT"] = str(port)
    try:
        begun = time.monotonic()
        done = escala(environment, "demo", "law", "--seed", str(seed), "--minutes", str(minutes))
        seconds = time.monotonic() - begun
        demo = outcome(environment, seed, busy, seconds, done.returncode)
        return demo, done.stdout + done.stderr
    finally:
        escala(environment, "down")
        shutil.rmtree(home, ignore_errors=True)


def outcome(environment: dict[str, str], seed: int, busy: bool, seconds: float, ended: int) -> Demo:
    """What the demo's home says of its law and of its forecast."""
    laws = json.loads(escala(environment, "laws", "list", "--json").stdout or "[]")
    healthy = bool(laws) and laws[0]["healthy"]
    listed = json.loads(escala(environment, "forecasts", "list", "--json").stdout or "{}")
    scored = [f for f in listed.get("forecasts", []) if f["obtained_nats"] is not None]
    if not scored:
        return Demo(seed, busy, seconds, ended, healthy, None, None, None, None, None)
    last = scored[-1]
    predicted, obtained = last["loss_nats"], last["obtained_nats"]
    width = (last["high_nats"] - last["low_nats"]) / predicted
    factor = last["extrapolation"].get("compute_flops")
    return Demo(seed, busy, seconds, ended, healthy, last["inside"], obtained / predicted - 1, width, factor,
                last["run_id"])  # fmt: skip


def missed(found: list[Demo]) -> bool:
    """Print the figures beside their floors; whether one is missed."""
    told = [demo for demo in found if demo.error is not None and demo.width is not None]
    healthy = sum(demo.healthy for demo in found) / len(found)
    inside = sum(bool(demo.inside) for demo in found) / len(found)
    width = statistics.median(demo.width or 0.0 for demo in told) if told else float("inf")
    error = statistics.median(abs(demo.error or 0.0) for demo in told) if told else float("inf")
    slow = [d.seconds for d in found if d.seconds > (BUSY_SECONDS if d.busy else QUIET_SECONDS)]
    print(f"healthy       {healthy:.0%} of {len(found)}   floor {FEWEST_HEALTHY:.0%}")
    print(f"inside 90 %   {inside:.0%} of {len(found)}   floor {FEWEST_INSIDE:.0%}")
    print(f"median width  {width:.1%}   floor {WIDEST:.0%}")
    print(f"median error  {error:.2%}   floor {LARGEST_ERROR:.0%}")
    for name, busy, limit in (("quiet", False, QUIET_SECONDS), ("busy", True, BUSY_SECONDS)):
        times = [demo.seconds for demo in found if demo.busy == busy]
        if times:
            print(f"{name:13} median {statistics.median(times):.0f} s, at most {max(times):.0f} s   "
                  f"floor {limit:.0f} s")  # fmt: skip
    low = healthy < FEWEST_HEALTHY or inside < FEWEST_INSIDE
    return low or width > WIDEST or error > LARGEST_ERROR or bool(slow)


if __name__ == "__main__":
    sys.exit(main())
