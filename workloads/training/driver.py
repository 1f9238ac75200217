"""Starting Ray Train's workers from the driver."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from escala.schema import ResourcesConfig
from workloads.training.device import process_group_backend
from workloads.training.entry import WorkerInputs

TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # a dead worker is seen in a quarter of a second, not in two
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line of a worker twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor less: preemption comes as SIGTERM
}


WORKER = "workloads.training.worker:train"
"""What each rank runs. By name: its module needs DeepSpeed, which the driver and Ray's controller do without."""


def train_worker(arguments: dict[str, Any]) -> None:
    """One rank of the run. Raises what the run loop raises."""
    resolve_name(WORKER)(arguments["inputs"])


# Huge pages make fresh memory cheaper: 3 % of a step. Tensors of 32 MB and more would still be fresh each time: kept by
# glibc, 128 MB are written in 40 ms instead of 88, at the same peak. With checkpointing blocks of 1 MB and more are
# given back at once instead: 9 % of a step, and half the memory, since glibc would keep the freed activations.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
KEEP = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
GIVE_BACK = "glibc.malloc.mmap_threshold=1048576"


def allocator(checkpointing: bool = False) -> dict[str, str]:
    """The environment of a process that trains: read by the C library when it starts."""
    return {"GLIBC_TUNABLES": f"{HUGE_PAGES}:{GIVE_BACK if checkpointing else KEEP}"}


def fit(inputs: WorkerInputs[Any]) -> None:
    """Run the training loop on the workers that `resources` asks for. Raises ray.train.TrainingFailedError."""
    config = inputs.config
    environment = allocator(config.training.activation_checkpointing)
    start_workers(train_worker, {"inputs": inputs}, config.resources, inputs.spec.directory, environment)


def start_workers(
    worker: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    resources: ResourcesConfig,
    directory: str,
    environment: Mapping[str, str],
) -> None:
    """Run `worker` on a Ray Train group with a process group of its own. Raises ray.train.TrainingFailedError.

    FailureConfig(max_failures=0): a failure ends the attempt.
    """
    os.environ.update(TRAIN_ENVIRONMENT)
    needed = {"CPU": resources.cpus_per_worker, "GPU": float(resources.gpus_per_worker)}
    _warn_if_scarce({k: v * resources.workers for k, v in needed.items() if v})
    on_gpu = bool(resources.gpus_per_worker)
    variables = {
        **environment,
        "OMP_NUM_THREADS": str(resources.threads_per_worker),  # oversubscribed OpenMP costs up to 10x
        "DS_ACCELERATOR": "cuda" if on_gpu else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # DeepSpeed's use of torch.distributed, once a collective
    }
    trainer = TorchTrainer(
        worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(backend=process_group_backend(on_gpu)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=on_gpu,
            resources_per_worker={k: v for k, v in needed.items() if v},
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(Path(directory) / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": variables},
        ),
    )
    trainer.fit()


def _warn_if_scarce(needed: dict[str, float]) -> None:
    """Ray waits forever for what a cluster does not have; an autoscaling one may yet get it."""
    have = ray.cluster_resources()
    short = [
        f"{amount:g} {name} (it has {have.get(name, 0):g})"
        for name, amount in needed.items()
        if have.get(name, 0) < amount
    ]
    if short:
        print(f"waiting for the cluster to grow: the job needs {', '.join(short)}", flush=True)
