"""The rollout service as a Ray Serve application: `escala rollouts up FILE`, `serve deploy FILE`, or
`serve.run(application({...}))`; a FILE is `clusters/services/rollouts.yaml`.

`api` takes requests (HTTP and Python handles), `policy` generates and scales, `reward` and `judge` score, where the
configuration has them. Weights, versions and the scaling decision: `escala.rollouts`.
"""

from __future__ import annotations

import math
import secrets
import warnings
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, DeploymentActorConfig
from ray.serve.deployment import Application

from escala.contract.errors import SpecError
from escala.rollouts.store import Store
from escala.schema.serve import POLICY, ServeConfig
from workloads.serving.api import Api
from workloads.serving.places import Places
from workloads.serving.policy import STORE, Policy
from workloads.serving.replica import PLACES
from workloads.serving.scores import JudgeReplica, RewardReplica
from workloads.training.driver import HUGE_PAGES

HEALTH_SECONDS = (
    2.0  # how soon a dead replica is replaced, and an owner's end noticed; Serve's own 10 is a long wait
)
ON_HEAD = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
"""For what reserves nothing, and would start on any node: an autoscaler could not take that node away again (measured,
Ray 2.60), and who ends it, a spot market say, ends it too. The store's copy of the weights lies on the head for it."""
API_REQUESTS = 10_000  # that wait or run at the ingress, which only passes them on


def application(args: dict[str, Any]) -> Application:
    """The application of a `ServeConfig`, given as plain data. Raises SpecError where it does not validate."""
    try:
        config = ServeConfig.model_validate(args)
    except ValidationError as error:
        raise SpecError(
            f"The service's arguments don't hold: {error}", "See escala/schema/serve.py."
        ) from error
    plain = config.model_dump(mode="json")
    policy = policy_deployment(config).bind(plain)
    reward = _scorer(RewardReplica, "reward", config).bind(plain) if config.reward else None
    judge = _scorer(JudgeReplica, "judge", config).bind(plain) if config.judge else None
    api = serve.deployment(
        Api,
        name="api",
        num_replicas=1,
        max_ongoing_requests=API_REQUESTS,
        ray_actor_options=ON_HEAD,
        graceful_shutdown_timeout_s=config.shutdown_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_SECONDS,
    )
    return api.bind(plain, policy, reward, judge)


def policy_deployment(config: ServeConfig) -> serve.Deployment:
    """The replicas that generate, with the store of their weight versions.

    A replica takes twice its batch: the rest waits at the ingress, where a new replica finds it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field")  # Serve has no other way yet
        autoscaling = AutoscalingConfig(**config.autoscaling())
    store = DeploymentActorConfig(
        name=STORE,
        actor_class=ray.remote(Store),
        init_kwargs={"key": secrets.token_hex(8), "has_owner": config.owner is not None},
        actor_options={**ON_HEAD, "max_concurrency": 1000},
    )
    return serve.deployment(
        Policy,
        name=POLICY,
        autoscaling_config=autoscaling,
        deployment_actors=[store, *_places(config)],
        max_ongoing_requests=max(
            2 * config.engine.max_running, math.ceil(autoscaling.target_ongoing_requests)
        ),
        ray_actor_options={
            **_resources(config),
            "runtime_env": {"env_vars": {"GLIBC_TUNABLES": HUGE_PAGES, "OMP_NUM_THREADS": "1"}},
        },
        graceful_shutdown_timeout_s=config.shutdown_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_SECONDS,
    )


def _resources(config: ServeConfig) -> dict[str, float]:
    """What a replica reserves itself."""
    return {
        "num_cpus": 0 if config.holds_places else config.replica_cpus,
        "num_gpus": config.replica_gpus,
    }


def _places(config: ServeConfig) -> list[DeploymentActorConfig]:
    """What holds the replicas' places, where they do not themselves."""
    if not config.holds_places:
        return []
    return [
        DeploymentActorConfig(
            name=PLACES,
            actor_class=ray.remote(Places),
            init_kwargs={"cpus": config.replica_cpus},
            actor_options={**ON_HEAD, "max_concurrency": 1000},
        )
    ]


def _scorer(kind: type, name: str, config: ServeConfig) -> serve.Deployment:
    return serve.deployment(
        kind,
        name=name,
        num_replicas=1,
        max_ongoing_requests=64,
        deployment_actors=_places(config),
        ray_actor_options=_resources(config),
        graceful_shutdown_timeout_s=config.shutdown_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_SECONDS,
    )
