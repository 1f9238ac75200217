"""Weights to two replicas against a bare broadcast, and a burst that scales 1 -> 3 -> 1.

    python benchmarks/rollouts.py [--megabytes 250] [--rounds 7] [--requests 36]

One home and one Ray head for both. publish: `escala.rollouts.weights.publish` to two actors with a `Receiver` each
(digest, announcement, verification, acknowledgement, the store's own copy), which copy the tensors over their own;
bare: `ray.put`, and two actors that get the object and copy it likewise. Rounds alternate; medians; the ratio's floor
is 2. burst: the service with a tiny random model, whose replicas reserve a tenth of a CPU each, so that three are not
more than a small machine has; more requests than one replica holds, all at once; the time of the first reaction (floor
15 s), of three replicas at work (they must be before the burst is over), of one again; a failed request misses the
floor. Exit code 1 where a floor is missed.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

FLOORS = {"publish_ratio": 2.0, "reaction_seconds": 15.0, "failed": 0}
TENSORS = 64
REPLICAS = 3  # at the burst's height
UP_SECONDS, DOWN_SECONDS = 1.0, 5.0
LIMIT_SECONDS = 300.0  # for each step of the burst


def main() -> int:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=36)
    parser.add_argument("--only", choices=["publish", "burst"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="escala-bench-") as directory:
        return measure(Path(directory), options)


def measure(home: Path, options: argparse.Namespace) -> int:
    """Both on a cluster of their own."""
    from escala import Escala

    live_in(home)
    Escala().up(print)
    try:
        connect()
        good = [publish(options.megabytes, options.rounds)] if options.only != "burst" else []
        good += [burst(home, options.requests)] if options.only != "publish" else []
    finally:
        Escala().down(print)
    return 0 if all(good) else 1


def live_in(home: Path) -> None:
    """This process's settings: a home of its own, on free ports."""
    from tests.conftest import free_ports

    ports = ("RAY_PORT", "RAY_DASHBOARD_PORT", "MLFLOW_PORT", "ROLLOUTS_PORT")
    os.environ |= {f"ESCALA_{p}": str(n) for p, n in zip(ports, free_ports(4), strict=True)}
    os.environ |= {"ESCALA_HOME": str(home), "OMP_NUM_THREADS": "1"}


def connect() -> None:
    """This process as a client of the cluster."""
    from escala.cluster import connection
    from escala.runtime_env import source_paths
    from escala.settings import Settings

    os.environ |= connection(Settings()).environment
    import ray

    paths = os.pathsep.join([*source_paths(), str(Path(__file__).parents[1])])
    ray.init(Settings().gcs_address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})


class Replica:
    """Two ways to take weights: by the contract, and bare."""

    def __init__(self, megabytes: int) -> None:
        import torch

        self.own = {name: torch.zeros_like(tensor) for name, tensor in state(megabytes).items()}

    async def follow(self, store: Any, name: str) -> None:
        """Serve by the contract from here on."""
        from escala.rollouts.weights import Receiver, WeightVersion

        async def apply(version: Any, weights: Any) -> None:
            self.copy(weights)

        self.receiver = Receiver(lambda: store, name, apply)
        await self.receiver.start(WeightVersion(0, "0" * 32, "fp32"))

    async def take(self, where: list[Any]) -> bool:
        """Get an object and copy it."""
        self.copy(await where[0])
        return True

    def copy(self, weights: Any) -> None:
        """The tensors over our own."""
        from workloads.serving.weights import unpack

        for name, tensor in unpack(weights).items():
            self.own[name].copy_(tensor)


def state(megabytes: int) -> dict[str, Any]:
    """Random fp32 tensors of this size together."""
    import torch

    torch.manual_seed(0)
    return {f"w{i:03d}": torch.randn(megabytes * 250_000 // TENSORS) for i in range(TENSORS)}


def publish(megabytes: int, rounds: int) -> bool:
    """Print the medians and their ratio."""
    import ray

    from escala.rollouts import weights as contract
    from escala.rollouts.store import Store
    from workloads.serving.weights import pack

    store = ray.remote(Store).options(num_cpus=0, max_concurrency=100).remote(uuid.uuid4().hex)
    names = ("first", "second")
    make = ray.remote(Replica)
    replicas = [make.options(name=n, namespace="bench", num_cpus=0).remote(megabytes) for n in names]
    ray.get([r.follow.remote(store, f"bench/{n}") for r, n in zip(replicas, names, strict=True)])
    weights, ours, bare = state(megabytes), [], []
    for number in range(rounds + 1):
        weights["w000"][0] = number  # others in each round: a replica fetches none that it has
        packed = pack(weights)
        started = time.perf_counter()
        where = [ray.put(packed)]
        ray.get([replica.take.remote(where) for replica in replicas])
        bare.append(time.perf_counter() - started)
        del where
        published = contract.publish(store, packed, number + 1, precision="fp32")
        assert len(published.replicas) == len(replicas)
        ours.append(published.seconds)
    mine, theirs = statistics.median(ours[1:]), statistics.median(bare[1:])  # the first warms the store up
    ratio = mine / theirs
    print(
        f"publish {packed.bytes / 1e6:.0f} MB to {len(replicas)} replicas {mine:.3f} s, bare broadcast {theirs:.3f} s: "
        f"{ratio:.2f}x, floor {FLOORS['publish_ratio']}x; rounds {seconds(ours[1:])} and {seconds(bare[1:])}"
    )
    for replica in replicas:
        ray.kill(replica)
    return ratio <= FLOORS["publish_ratio"]


def seconds(values: list[float]) -> str:
    """A list of times."""
    return " ".join(f"{value:.3f}" for value in values)


def burst(home: Path, requests: int) -> bool:
    """Print when the service reacted, and that nothing failed."""
    from concurrent.futures import ThreadPoolExecutor

    from escala import Escala
    from escala.contract.errors import EscalaError
    from escala.views.rollouts import DeploymentView
    from workloads.generation.protocol import SamplingParams
    from workloads.serving.client import Rollouts

    scaling = f"{{max_replicas: {REPLICAS}, up_seconds: {UP_SECONDS}, down_seconds: {DOWN_SECONDS}}}"
    Escala().rollouts_up(
        (), [f"model={tiny(home)}", f"scaling={scaling}", "engine.max_running=2", "replica_cpus=0.1"]
    )
    rollouts, failed = Rollouts(), 0
    params = SamplingParams(max_tokens=1000, ignore_eos=True)

    def ask(number: int) -> bool:
        try:
            return len(rollouts.generate([[number + 1, 2]], params)[0].completion.token_ids) == 1000
        except EscalaError as error:
            print(error)
            return False

    def wait(condition: Any) -> float:
        begun = time.monotonic()
        while not condition(policy()):
            if time.monotonic() - begun > LIMIT_SECONDS:
                return math.inf
            time.sleep(0.2)
        return time.monotonic() - started

    def policy() -> DeploymentView:
        return next(d for d in Escala().rollouts_status(weights=False).deployments if d.name == "policy")

    started = time.monotonic()
    with ThreadPoolExecutor(requests) as pool:
        answers = [pool.submit(ask, number) for number in range(requests)]
        reaction = wait(lambda p: p.target_replicas > 1)
        all_run = wait(lambda p: sum(r.state == "RUNNING" for r in p.replicas) == REPLICAS)
        failed = sum(not answer.result() for answer in answers)
        done = time.monotonic() - started
    one = wait(lambda p: p.target_replicas == 1 and len(p.replicas) == 1)
    print(
        f"burst of {requests}: reaction after {reaction:.1f} s, floor {FLOORS['reaction_seconds']:g} s; "
        f"{REPLICAS} replicas after {all_run:.1f} s, all answered after {done:.1f} s, one replica after {one:.1f} s; "
        f"{failed} failed, floor {FLOORS['failed']}"
    )
    Escala().rollouts_down()
    scaled = all_run < done and one < math.inf
    return scaled and reaction <= FLOORS["reaction_seconds"] and failed <= FLOORS["failed"]


def tiny(home: Path) -> Path:
    """A random model with a tokenizer, in Hugging Face's layout."""
    import torch

    from escala.schema import ModelConfig
    from workloads.data.tokenizer import train_tokenizer
    from workloads.model.huggingface import save_pretrained
    from workloads.model.transformer import Transformer

    config = ModelConfig(vocab_size=512, n_layers=2, d_model=64, n_heads=2, max_context_tokens=1024)
    torch.manual_seed(0)
    directory = home / "tiny"
    save_pretrained(Transformer(config), directory)
    train_tokenizer([inspect.getsource(argparse)], config.vocab_size).save(str(directory / "tokenizer.json"))
    return directory


if __name__ == "__main__":
    sys.exit(main())
