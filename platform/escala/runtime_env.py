"""The environment variables of a job's driver and its workers, and the only builder of a Ray runtime_env."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from escala.contract.records import ONE_NODE
from escala.contract.redaction import hide
from escala.storage import user_code

PACKAGES = ("escala", "workloads", "tune_spaces")
PASSED_ON = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HF_HOME")
"""Of this process's environment. Not RAY_AUTH_TOKEN: a runtime_env is shown in Ray's dashboard, and Ray's own
processes, from which drivers and workers inherit, have it already."""


def job_variables(
    ray_address: str,
    threads: int = 1,
    gpus: bool = False,
    tracking_uri: str | None = None,
    environ: Mapping[str, str] = os.environ,
    code: Path | None = None,
    one_node: bool = False,
) -> dict[str, str]:
    """The environment variables of a job.

    Args:
        ray_address: HOST:PORT of the head's GCS. Without it, a killed Train run on a machine with two Ray
            instances leaks its placement group.
        threads: per worker process; more threads than cores cost up to 10x.
        gpus: whether the job's workers have GPUs.
        tracking_uri: passed on when it is a server's address without a password: Ray's dashboard shows a runtime_env.
        environ: what the fixed list PASSED_ON is read from.
        code: the copy of the user's modules (escala.storage.user_code).
        one_node: whether the cluster is this machine alone, as the embedded one is: a job's rollout service holds its
            places there (ServeConfig.hold_places).
    """
    variables = {
        "RAY_ADDRESS": ray_address,
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # a lost worker is seen sooner (default 2)
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # saves an actor; our driver handles SIGTERM itself
        "TOKENIZERS_PARALLELISM": "false",
    }
    variables |= {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    if paths := source_paths():
        variables["PYTHONPATH"] = os.pathsep.join(paths)
    if not gpus:
        variables["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed guesses, wrongly for a CPU job on a GPU machine
    if (
        tracking_uri
        and tracking_uri.startswith(("http://", "https://"))
        and hide(tracking_uri) == tracking_uri
    ):
        variables["MLFLOW_TRACKING_URI"] = tracking_uri
    if code is not None:
        variables[user_code.VARIABLE] = str(code)
    if one_node:
        variables[ONE_NODE] = "1"
    variables |= {name: environ[name] for name in PASSED_ON if name in environ}
    return variables


def runtime_env(variables: Mapping[str, str]) -> dict[str, Any]:
    """A Ray runtime_env with these environment variables."""
    return {"env_vars": dict(variables)}


def source_paths() -> list[str]:
    """The directories that our packages are imported from in a checkout; none when they are installed."""
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    found: list[str] = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations if spec else None) or ():
            parent = Path(location).resolve().parent
            if parent not in installed and str(parent) not in found:
                found.append(str(parent))
    return found
