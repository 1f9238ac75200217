"""CPU that a sweep costs beside its training: per one-worker trial, against the bare loop and a TorchTrainer each.

    python benchmarks/sweeps.py [--trials 24] [--peers 4]

One home and one Ray head for all sides. ours: `escala sweep` over small trials. peer: Ray Tune again, each trial
starting a Ray Train TorchTrainer of one worker with the same training loop. bare: the same models, batches and
steps in a plain PyTorch loop, in one process, its imports not counted. CPU is the whole machine's, so let nothing
else run: a sum over processes would miss those that end. What the idle cluster uses in the same time is measured
afterwards and taken off. Exit code 1 where a floor is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

FLOORS = {"overhead_seconds": 2.5, "peer_ratio": 5.0}
IDLE_SECONDS = 20.0
SIDE_SECONDS = 600.0  # at most, for the bare loop or the peer
STEPS = 300
SPACE = {
    "design": "grid",
    "concurrency": 2,
    "base": {
        "model": {"vocab_size": 512, "n_layers": 2, "d_model": 64, "n_heads": 2, "max_context_tokens": 64},
        "data": {"tokenizer": {"vocab_size": 512, "train_characters": 300_000}, "max_characters": 2_000_000},
        "training": {"batch_sequences": 8, "evaluation_tokens": 4096, "steps": STEPS, "log_every_steps": 10},
    },
}


def main() -> int:
    """Measure the three sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--peers", type=int, default=4, help="trials of the peer, which takes long")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "bare":
        return bare(json.loads(Path(options.spec).read_text()))
    if options.side == "peer":
        return peer(json.loads(Path(options.spec).read_text()))
    with tempfile.TemporaryDirectory(prefix="escala-bench-") as directory:
        return measure(Path(directory), options.trials, options.peers)


def measure(home: Path, trials: int, peers: int) -> int:
    """All sides on one cluster."""
    from tests.conftest import free_ports

    names = ("ESCALA_RAY_PORT", "ESCALA_RAY_DASHBOARD_PORT", "ESCALA_MLFLOW_PORT")
    os.environ |= dict(zip(names, map(str, free_ports(3)), strict=True))
    os.environ |= {"ESCALA_HOME": str(home), "OMP_NUM_THREADS": "1"}
    from escala import Escala
    from escala.sweeps import trials as stored

    Escala().up(print)
    try:
        run_sweep(home, "warm", seeds=[1000])  # the data and the head's first workers
        job, ours = counted(lambda: run_sweep(home, "ours", seeds=list(range(trials))))
        planned = stored.read_planned(home, job)
        spec = home / "bare.json"
        prepared = next((home / "data" / "prepared").glob("*.json"))
        spec.write_text(json.dumps({"configs": [p.trial.config for p in planned], "prepared": str(prepared)}))
        plain = float(python("bare", spec).splitlines()[-1])
        peer_spec = home / "peer.json"
        configs = [reseeded(p.trial.config, 5000 + p.number) for p in planned[:peers]]
        peer_spec.write_text(json.dumps({"configs": configs, "prepared": str(prepared), "home": str(home)}))
        _, theirs = counted(lambda: python("peer", peer_spec))
        idle = counted(lambda: time.sleep(IDLE_SECONDS))[1].rate  # a rate over time needs time
    finally:
        Escala().down(print)
    each = plain / trials
    one, other = ours.less(idle) / trials, theirs.less(idle) / peers
    overhead, peer_overhead = one - each, other - each
    ratio = peer_overhead / overhead
    print(
        f"sweep {job}: {trials} trials of {STEPS} steps; idle cluster {idle:.3f} CPU-seconds a second, taken off"
    )
    floor, least = FLOORS["overhead_seconds"], FLOORS["peer_ratio"]
    print(f"bare loop                 {each:8.2f} CPU-seconds a trial")
    print(f"escala sweep              {one:8.2f}  overhead {overhead:6.2f}  floor {floor}")
    print(
        f"a TorchTrainer per trial  {other:8.2f}  overhead {peer_overhead:6.2f}  {ratio:.1f}x, floor {least}x"
    )
    return 0 if overhead <= floor and ratio >= least else 1


def reseeded(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same trial from another seed."""
    return {**config, "training": {**config["training"], "seed": seed}}


def run_sweep(home: Path, name: str, **keys: Any) -> str:
    """One sweep to its end, by the command line; its job's id."""
    from escala import Escala, documents

    path = home / f"{name}.yaml"
    path.write_text(documents.dump({**SPACE, "vary": {"training.optimizer.learning_rate": [3e-3]}, **keys}))
    command = [sys.executable, "-m", "escala.cli.main", "sweep", str(path), "--json"]
    job = str(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["id"])
    for watched in Escala().watch(job):
        if watched.job.state == "failed":
            raise SystemExit(f"the sweep failed: {watched.job.message}")
    return job


@dataclass(frozen=True)
class Used:
    """CPU seconds of the machine in some wall seconds."""

    cpu: float
    wall: float

    @property
    def rate(self) -> float:
        """CPU seconds a second."""
        return self.cpu / self.wall

    def less(self, idle: float) -> float:
        """CPU seconds without those of an idle cluster."""
        return self.cpu - idle * self.wall


def counted(act: Callable[[], Any]) -> tuple[Any, Used]:
    """What `act` gives, and what the machine used meanwhile."""
    began, before = time.monotonic(), busy()
    given = act()
    return given, Used(busy() - before, time.monotonic() - began)


def busy() -> float:
    """CPU seconds that this machine has worked since it started."""
    import psutil

    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def python(side: str, spec: Path) -> str:
    """Run a side of this script; what it prints."""
    from escala.managed import ray_environment
    from escala.settings import Settings

    command = [sys.executable, __file__, "--side", side, "--spec", str(spec)]
    environment = os.environ | ray_environment(Settings()) | {"PYTHONPATH": "."}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, timeout=SIDE_SECONDS
    )
    return done.stdout


def bare(given: dict[str, Any]) -> int:
    """The same training in plain PyTorch: model, batches, clipping, AdamW, an evaluation before and after."""
    import torch
    from torch.nn.functional import cross_entropy

    from escala.schema import PretrainConfig
    from workloads.data.batches import Batches
    from workloads.data.prepared import PreparedData
    from workloads.model.transformer import Transformer
    from workloads.training.schedule import learning_rate

    torch.set_num_threads(1)
    data = PreparedData.open(given["prepared"])
    began = time.process_time()
    for plain in given["configs"]:
        config = PretrainConfig(**plain)
        training = config.training
        torch.manual_seed(training.seed)
        model = Transformer(config.model)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batches = Batches(
            data, config.context_tokens, training.batch_sequences, training.seed, training.batch_sequences
        )
        held_NT1 = data.held_out(config.context_tokens, training.evaluation_tokens)

        def evaluate(
            model: Any = model, held_NT1: Any = held_NT1, rows: int = training.batch_sequences
        ) -> None:
            with torch.no_grad():
                for part in held_NT1.split(rows):
                    cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()).item()

        evaluate()
        for step in range(config.total_steps):
            tokens = batches.batch(step, 0, 1, 0)
            loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        evaluate()
    print(time.process_time() - began)
    return 0


def peer(given: dict[str, Any]) -> int:
    """Ray Tune, each trial with a TorchTrainer of one worker."""
    import ray
    from ray import tune

    from escala.runtime_env import runtime_env
    from escala.settings import Settings

    address = Settings().gcs_address
    ray.init(address=address, runtime_env=runtime_env(address), log_to_driver=False)

    def trial(values: dict[str, Any]) -> None:
        from escala.contract import handshake
        from escala.contract.records import AttemptFiles, AttemptSpec, write_json
        from escala.tracking.lineage.lifecycle import LiveAttempt
        from workloads.data.prepared import PreparedData
        from workloads.pretrain import described
        from workloads.training.driver import fit
        from workloads.training.run import ending, parse, summary, worker_inputs

        directory = Path(given["home"]) / "peers" / str(values["number"])
        files = AttemptFiles(directory)
        directory.mkdir(parents=True)
        config = given["configs"][values["number"]]
        where = {"directory": str(directory), "checkpoints": str(directory / "checkpoints"), "data": ""}
        spec = AttemptSpec(
            job_id=f"peer{values['number']}",
            attempt=1,
            name="peer",
            workload="pretrain",
            entry_point="workloads.pretrain",
            config=config,
            tracking_uri=f"spool:{files.spool}",
            experiment="peer",
            versions=handshake.versions(),
            **where,
        )
        write_json(files.spec, spec)
        with LiveAttempt(spec, summarise=summary) as attempt:
            parsed = attempt.open(partial(parse, spec.workload))
            prepared = described(PreparedData.open(given["prepared"]), parsed)
            fit(worker_inputs(attempt, prepared, parsed))
            attempt.outcome = ending(attempt)
        tune.report({"done": 1})

    numbers = tune.grid_search(list(range(len(given["configs"]))))
    results = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.1}),
        param_space={"number": numbers},
        tune_config=tune.TuneConfig(max_concurrent_trials=2),
        run_config=tune.RunConfig(storage_path=str(Path(given["home"]) / "tune"), verbose=0),
    ).fit()
    if results.errors:
        raise SystemExit(f"the peer failed: {results.errors[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
