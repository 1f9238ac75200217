"""A hundred `escala submit` at once, each a process of its own, into a home without a queue: how many jobs there are.

    python benchmarks/submits.py [--count 100] [--at-once 10]

Starts an embedded cluster in a home of its own, and leaves nothing behind. One job runs at a time meanwhile; the others
wait, and all end with the cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SPEC = ["model={vocab_size: 512, n_layers: 2, d_model: 64, n_heads: 2, max_context_tokens: 64}",
        "data={tokenizer: {vocab_size: 512}}", "training={steps: 1, batch_sequences: 8}"]  # fmt: skip


def escala(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """One command, in a process of its own."""
    command = [sys.executable, "-m", "escala.cli.main", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def submit(environment: dict[str, str], number: int) -> subprocess.CompletedProcess[str]:
    """Submit one job, named after its number."""
    overrides = [word for each in SPEC for word in ("--set", each)]
    return escala(environment, "submit", "pretrain", *overrides, "--name", f"n{number}", "--json")


def main() -> int:
    """Submit, count, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=10)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="escala-submits-"))
    environment = os.environ | {"ESCALA_HOME": str(home), "ESCALA_MAX_RUNNING_JOBS": "1"}
    for name, port in zip(("RAY", "RAY_DASHBOARD", "MLFLOW"), free_ports(3), strict=True):
        environment[f"ESCALA_{name}_PORT"] = str(port)
    try:
        begun = time.monotonic()
        with ThreadPoolExecutor(options.at_once) as threads:
            done = list(threads.map(lambda n: submit(environment, n), range(options.count)))
        seconds = time.monotonic() - begun
        told = [json.loads(each.stdout)["id"] for each in done if each.returncode == 0]
        listed = json.loads(escala(environment, "ps", "--all", "--limit", "1000", "--json").stdout)
        errors = Counter(each.stderr.strip().splitlines()[-1] for each in done if each.returncode)
        names = Counter(job["name"] for job in listed)
        print(f"{options.count} submits, {options.at_once} at once, {seconds:.0f} s: {len(told)} told an id,")
        print(f"{len(set(told))} different; {len(listed)} jobs, {sum(n > 1 for n in names.values())} doubled")
        for text, count in errors.items():
            print(f"  {count} x {text}")
        return int({job["id"] for job in listed} != set(told) or len(listed) != options.count)
    finally:
        escala(environment, "down")
        shutil.rmtree(home, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


if __name__ == "__main__":
    sys.exit(main())
