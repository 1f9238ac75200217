"""The rollout service of one PPO job: started before its workers, taken down after them.

The application is the one that `escala rollouts up` builds, under the job's own name and without HTTP.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import torch
from ray import serve
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from escala.errors import ClusterError
from escala.records import AttemptSpec
from workloads.alignment.rollouts import served_rewards
from workloads.config import PpoConfig
from workloads.config.serve import EngineConfig, ScalingConfig, ServeConfig
from workloads.model.huggingface import save_pretrained
from workloads.model.start import new_model
from workloads.serve import application
from workloads.training.finetune import open_tokenizer

SHUTDOWN_SECONDS = 20.0  # responses that nobody waits for any more


def application_name(spec: AttemptSpec) -> str:
    """The Serve application of a job, or of a sweep's trial: the same for all its attempts."""
    return f"ppo-{spec.tags.get('escala.trial', spec.job_id)}"


@contextmanager
def rollout_service(spec: AttemptSpec, config: PpoConfig) -> Iterator[None]:
    """The job's service, with the model that the run starts from as version 0; a driver's call, Ray reached.

    One that an attempt left behind is replaced. Raises ClusterError where it does not come up.
    """
    name, written = application_name(spec), Path(spec.directory) / "policy"
    try:
        arguments = serve_config(config, policy_directory(config, written)).model_dump(mode="json")
        with _alone(spec):
            _start_serve()
            remove(name)
            try:
                serve.run(application(arguments), name=name, route_prefix=None)
            except RuntimeError as error:
                raise ClusterError(
                    f"the job's rollout service does not come up: {error}", "its replicas' logs say more"
                ) from error
        print(f"rollout service {name}: {config.rollouts.replicas} policy replicas", flush=True)
        yield
    finally:
        with _alone(spec):
            remove(name)
            if not serve.status().applications:
                serve.shutdown()  # so that the next one may start it with HTTP
        shutil.rmtree(written, ignore_errors=True)


def _start_serve() -> None:
    """Start Serve, without HTTP, where it does not run yet. A sweep's trial lives in a placement group, which has no
    room for Serve's controller: there a task outside of it starts it.
    """
    if get_current_placement_group() is None:
        serve.start(proxy_location="Disabled")
        return
    anywhere = PlacementGroupSchedulingStrategy(placement_group=None)
    task = ray.remote(num_cpus=0)(lambda: serve.start(proxy_location="Disabled"))
    ray.get(task.options(scheduling_strategy=anywhere).remote())


@contextmanager
def _alone(spec: AttemptSpec) -> Iterator[None]:
    """While no other job of this home starts or ends Serve: one would end what another has just found running."""
    with (Path(spec.data) / "serve.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove(name: str) -> None:
    """Take an application down, if it is there."""
    if name in serve.status().applications:
        serve.delete(name)


def serve_config(config: PpoConfig, model: Path) -> ServeConfig:
    """The application's configuration."""
    service = config.rollouts
    return ServeConfig(
        model=str(model),
        name="policy",
        precision=config.training.precision,
        engine=EngineConfig(
            max_running=service.max_running, max_response_tokens=config.sampling.max_response_tokens
        ),
        scaling=ScalingConfig(min_replicas=service.replicas, max_replicas=service.replicas),
        reward=served_rewards(config),
        replica_cpus=service.replica_cpus,
        replica_gpus=service.replica_gpus,
        sync_seconds=service.timeout_seconds,
        shutdown_seconds=SHUTDOWN_SECONDS,
    )


def policy_directory(config: PpoConfig, target: Path) -> Path:
    """Where the service finds the run's first model and its tokenizer: the start itself; or, for a model drawn anew or
    another tokenizer, `target`, written in Hugging Face's layout.
    """
    if config.start is not None and config.start.path is not None and config.tokenizer is None:
        return Path(config.start.path)
    torch.manual_seed(config.training.seed)
    tokenizer = open_tokenizer(config)
    save_pretrained(new_model(config), target, tokenizer.end_of_text)
    tokenizer.save(target)
    return target
