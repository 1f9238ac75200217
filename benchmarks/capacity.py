"""A served mixture of experts at several capacity factors: latency, tokens a second and the weight version of each.

    escala up && escala submit pretrain ...; python benchmarks/capacity.py JOB [--factors 2,1,0.75] [--seconds 20]

In the home that the ESCALA_* variables name; JOB is a pretraining job of a mixture there. One replica, 16 clients that
ask again as soon as they are answered (128 tokens of prompt, 48 of response), all factors in turn, twice. The held-out
loss at a factor is that of the same job with `model.moe.evaluation_capacity_factor`: its run's `held_out_loss_nats`.
Exit code 1 where a version does not say its factor.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from typing import Any

CLIENTS, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 128, 48
WAIT_SECONDS = 60.0


def main() -> int:
    """Serve, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job")
    parser.add_argument("--factors", default="2,1,0.75")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    factors = [float(text) for text in options.factors.split(",")]
    from benchmarks.rollouts import connect
    from escala import Escala

    Escala().rollouts_up(
        (), [f"model={options.job}", "name=mixture", f"engine.max_running={CLIENTS}"], report=print
    )
    try:
        connect()
        return measure(factors, options.seconds)
    finally:
        Escala().rollouts_down(report=print)


def measure(factors: list[float], seconds: float) -> int:
    """Each factor twice, in turn."""
    from ray import serve

    policy = serve.get_deployment_handle("policy", "escala")
    good, rows = True, dict[str, list[tuple[float, float, float]]]()
    for factor in [None, *factors] * 2:
        wanted = policy.set_capacity.remote(factor).result(timeout_s=WAIT_SECONDS)
        name = served(wanted.version)
        good &= factor is None or name.endswith(f"-cf{factor:g}")
        latencies, tokens = asked(seconds)
        p95 = sorted(latencies)[-(-95 * len(latencies) // 100) - 1]
        print(
            f"{name}: p50 {statistics.median(latencies):.3f} s, p95 {p95:.3f} s, {tokens:.0f} tokens/s",
            flush=True,
        )
        rows.setdefault(str(factor), []).append((statistics.median(latencies), p95, tokens))
    for factor, found in rows.items():
        p50, p95, tokens = (statistics.mean(values) for values in zip(*found, strict=True))
        print(f"capacity factor {factor}: p50 {p50:.3f} s, p95 {p95:.3f} s, {tokens:.0f} tokens/s")
    return 0 if good else 1


def served(version: int) -> str:
    """The version's name, once the replica serves it."""
    from escala import Escala

    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        weights: dict[str, Any] = Escala().rollouts_status().weights or {}
        if set(weights.get("replicas", {}).values()) == {version}:
            return str(weights["name"] or f"v{version}")
        if time.monotonic() > deadline:
            sys.exit(f"version {version} is not served: {weights}")
        threading.Event().wait(0.2)


def asked(seconds: float) -> tuple[list[float], float]:
    """(seconds of each request, generated tokens a second)."""
    from escala import Escala
    from escala.rollouts.load import Service, clients

    address = Escala().rollouts_status(weights=False).address or ""
    with clients(Service(address, "mixture"), CLIENTS, PROMPT_TOKENS, RESPONSE_TOKENS) as answers:
        threading.Event().wait(seconds)
    begun, ended = min(a.sent for a in answers), max(a.done for a in answers)
    return [a.seconds for a in answers], sum(a.response_tokens for a in answers) / (ended - begun)


if __name__ == "__main__":
    sys.exit(main())
