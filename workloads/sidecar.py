"""The rollout service of one PPO job: started before its workers, taken down after them.

The application is the one that `escala rollouts up` builds, under the job's own name and without HTTP.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.util import get_current_placement_group

from escala.contract.errors import ClusterError
from escala.contract.records import ONE_NODE, AttemptSpec, read_json, write_json
from escala.schema import PpoConfig
from escala.schema.engines import KINDS as ENGINES
from escala.schema.serve import OwnerConfig, ScalingConfig, ServeConfig
from workloads.alignment.rollouts import served_rewards
from workloads.model.huggingface import save_pretrained
from workloads.model.start import new_model
from workloads.serve import application
from workloads.serving.client import Rollouts
from workloads.serving.owner import ANYWHERE, alone, owner, remove
from workloads.training.finetune import open_tokenizer

QUIET = {"enable_access_log": False}  # a line for each response is most of a job's log
SHUTDOWN_SECONDS = 20.0  # responses that nobody waits for any more
KERNELS = "rollout_kernels.json"
"""In a job's directory: which kernels its service multiplies with."""


def application_name(spec: AttemptSpec) -> str:
    """The Serve application of a job, or of a sweep's trial: the same for all its attempts."""
    return f"ppo-{spec.tags.get('escala.trial', spec.job_id)}"


@contextmanager
def rollout_service(spec: AttemptSpec, config: PpoConfig) -> Iterator[None]:
    """The job's service, with the model that the run starts from as version 0; a driver's call, Ray reached.

    One that an attempt left behind is replaced; this one goes even where the driver is killed. Raises ClusterError
    where it does not come up.
    """
    name, written, lock = (
        application_name(spec),
        Path(spec.directory) / "policy",
        Path(spec.data) / "serve.lock",
    )
    try:
        with owner(f"{name}-{spec.attempt}", lock) as me:
            kernels = config.rollouts.kernels or _kernels_of(spec)
            arguments = serve_config(config, policy_directory(config, written), me, kernels)
            try:
                with alone(lock):
                    _start_serve()
                    _run(name, arguments.model_dump(mode="json"))
                if kernels is None:
                    measured = {"kernels": Rollouts(name).describe()["kernels"]}
                    write_json(Path(spec.directory).parent / KERNELS, measured)
                print(f"rollout service {name}: {config.rollouts.replicas} policy replicas", flush=True)
                yield
            finally:
                with alone(lock):
                    remove(name)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _run(name: str, arguments: dict[str, Any]) -> None:
    """Start the application in the place of an earlier attempt's."""
    if name in serve.status().applications:
        serve.delete(name)
    try:
        serve.run(application(arguments), name=name, route_prefix=None, logging_config=QUIET)
    except RuntimeError as error:
        raise ClusterError(
            f"the job's rollout service does not come up: {error}", "its replicas' logs say more"
        ) from error
    _own_logs_only()


def _start_serve() -> None:
    """Start Serve, without HTTP, where it does not run yet. A sweep's trial lives in a placement group, which has no
    room for Serve's controller: there a task outside of it starts it.
    """
    if get_current_placement_group() is None:
        serve.start(proxy_location="Disabled")
        return
    task = ray.remote(num_cpus=0)(lambda: serve.start(proxy_location="Disabled"))
    ray.get(task.options(scheduling_strategy=ANYWHERE).remote())


def _own_logs_only() -> None:
    """Undo what Serve does to a driver that connects to it: show the output of all jobs of the cluster in its own. Ray
    has no public switch for it.
    """
    ray._private.worker.global_worker._filter_logs_by_job = True


def _kernels_of(spec: AttemptSpec) -> str | None:
    """What an earlier attempt of this job chose, or the job that it goes on from: other kernels would draw other
    responses, and a resumed run be another one. None: nobody has chosen.
    """
    for path in filter(None, (spec.directory, spec.resume_from)):
        try:
            kernels: str = read_json(Path(path).parent / KERNELS)["kernels"]
            return kernels
        except FileNotFoundError:
            continue
    return None


def serve_config(config: PpoConfig, model: Path, me: OwnerConfig, kernels: str | None = None) -> ServeConfig:
    """The application's configuration, with this driver as its owner; `kernels` of an earlier attempt's."""
    service = config.rollouts
    return ServeConfig(
        model=str(model),
        name="policy",
        precision=service.precision or config.training.precision,
        quantization=service.quantization,
        kernels=kernels,
        engine=ENGINES.read(
            {
                "max_running": service.max_running,
                "max_response_tokens": config.sampling.max_response_tokens,
                "speculation": None if service.speculation is None else service.speculation.model_dump(),
            }
        ),
        scaling=ScalingConfig(min_replicas=service.replicas, max_replicas=service.replicas),
        reward=served_rewards(config),
        replica_cpus=service.replica_cpus,
        replica_gpus=service.replica_gpus,
        hold_places=ONE_NODE in os.environ,
        sync_seconds=service.timeout_seconds,
        shutdown_seconds=SHUTDOWN_SECONDS,
        owner=me,
    )


def policy_directory(config: PpoConfig, target: Path) -> Path:
    """Where the service finds the run's first model and its tokenizer: the start itself; or, for a random model or
    another tokenizer, `target`, written in Hugging Face's layout.
    """
    if config.start is not None and config.start.path is not None and config.tokenizer is None:
        return Path(config.start.path)
    torch.manual_seed(config.training.seed)
    tokenizer = open_tokenizer(config)
    save_pretrained(new_model(config), target, tokenizer.end_of_text)
    tokenizer.save(target)
    return target
