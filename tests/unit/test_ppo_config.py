"""The ppo workload's configuration: what is derived, and what makes no sense together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from escala import spec
from escala.contract.errors import SpecError
from escala.hardware import load_cluster
from escala.planning.cost import cost
from escala.schema import PpoConfig
from escala.schema.flops import step_flops_per_token, training_flops_per_token
from escala.schema.serve import OwnerConfig
from escala.settings import Settings

BASE: dict[str, Any] = {
    "model": {"vocab_size": 300, "n_layers": 2, "d_model": 32, "n_heads": 2, "max_context_tokens": 64},
    "tokenizer": "tokenizer.json",
    "prompts": "prompts.jsonl",
    "rewards": [{"kind": "function", "function": "a:b"}],
    "sampling": {"max_response_tokens": 16},
    "batch": {"prompts": 8, "responses_per_prompt": 2},
}


def config(**changes: Any) -> PpoConfig:
    return PpoConfig(**spec.merge(BASE, changes))


def test_the_batch_and_the_critic_follow() -> None:
    plain = config()
    assert plain.training.batch_sequences == 16
    assert plain.critic is not None
    assert plain.critic_model == plain.model
    assert config(advantage={"kind": "rloo"}).critic is None
    assert PpoConfig(**plain.model_dump(mode="json")) == plain  # an attempt reads what was resolved


def test_workers_share_the_prompts() -> None:
    assert config().with_workers(4).micro_batch_sequences == 4
    with pytest.raises(ValueError, match="prompts 8 is not a multiple of 16 workers"):
        config().with_workers(16)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kl": {"place": "loss", "estimator": "k1"}}, "expectation of its gradient is zero"),
        ({"kl": {"estimator": "k3"}}, "k2 and k3 into the loss"),
        ({"kl": {"controller": "threshold"}}, "need target_nats"),
        ({"kl": {"early_stop_multiple": 1.5}}, "need target_nats"),
        ({"kl": {"controller": "threshold", "target_nats": 1, "coefficient": 0}}, "0 stays 0"),
        ({"kl": {"target_nats": 1}}, "no use"),
        ({"kl": {"controller": "proportional", "target_nats": 1, "horizon_episodes": 3}}, "a fifth"),
        ({"advantage": {"kind": "rloo"}, "critic": {}}, "takes no critic"),
        ({"advantage": {"kind": "grpo"}, "batch": {"responses_per_prompt": 1}}, "2 or more"),
        ({"mode": "one_step_off"}, "importance_cap"),
        (
            {"rollouts": {"precision": "int4"}},
            "int4 draws from other weights than the learner's: set policy_loss",
        ),
        ({"rollouts": {"quantization": {"group": 128}}}, "no use without rollouts.precision"),
        ({"training": {"batch_sequences": 8}}, "follows from batch"),
        ({"training": {"train_tokens": 1000}}, "as long as they come"),
        ({"training": {"micro_batch_sequences": 1}}, "micro_batch_tokens cuts"),
        ({"training": {"evaluate_every_steps": 1}}, "its evaluation"),
        ({"training": {"steps": 3}, "critic": {"warmup_iterations": 3}}, "no iteration for the actor"),
        ({"batch": {"prompts": 9}, "resources": {"workers": 2}}, "not a multiple of"),
        ({"batch": {"minibatches": 17}}, "more than the 16 responses"),
        ({"batch": {"micro_batch_tokens": 32}}, "less than one sequence of 64"),
        ({"sampling": {"max_response_tokens": 64}}, "no room for a prompt"),
        ({"shaping": {"length_penalty": 1, "length_free_tokens": 16}}, "not below max_response_tokens"),
        ({"lora": {"dropout": 0.1}}, "two masks"),
        (
            {"critic": {"model": {"vocab_size": 301, "max_context_tokens": 64}}},
            "vocabulary is not the actor's",
        ),
    ],
)
def test_contradictions_are_refused_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        spec.load_job("ppo", base=spec.merge(BASE, changes))


def test_a_judge_needs_a_second_response_or_a_reference() -> None:
    judge = {"kind": "judge", "judge": {"model": "judge"}}
    alone = {"rewards": [judge], "batch": {"responses_per_prompt": 1}}
    with pytest.raises(SpecError, match="compares a prompt's responses"):
        spec.load_job("ppo", base=spec.merge(BASE, alone))
    with_reference = {**alone, "rewards": [{**judge, "references": "references.jsonl"}]}
    spec.load_job("ppo", base=spec.merge(BASE, with_reference))


def test_flops_count_generation_three_forward_passes_and_the_epochs() -> None:
    without = config(advantage={"kind": "rloo"})
    forward = step_flops_per_token(without, 0) / 3
    assert step_flops_per_token(without, 2) == pytest.approx(9 * forward)
    assert training_flops_per_token(without) == step_flops_per_token(without, without.batch.epochs)
    with_critic = config()
    assert step_flops_per_token(with_critic, 2, frozen_actor=True) < step_flops_per_token(with_critic, 2)
    assert step_flops_per_token(with_critic, 0) > 3 * forward


def test_it_can_be_planned() -> None:
    answer = spec.resolve(spec.load_job("ppo", base=BASE))
    assert answer.derived["training.steps"] == 100
    assert answer.train_tokens == 100 * 16 * 64  # at most: responses are as long as they come
    found = cost(answer.spec.trained, load_cluster("local"))
    assert found.wall_seconds > 0
    assert any("PPO" in note for note in found.notes)


@pytest.mark.parametrize("local", [True, False])
def test_a_job_s_service_holds_its_places_on_the_local_cluster_and_logs_no_response(
    monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    from escala.runtime_env import job_variables
    from workloads import sidecar

    variables = job_variables("127.0.0.1:1", environ={}, one_node=local)
    monkeypatch.delenv("ESCALA_ONE_NODE", raising=False)
    for name in variables.keys() & {"ESCALA_ONE_NODE"}:
        monkeypatch.setenv(name, variables[name])
    rollouts = {"replica_cpus": 0.5, "speculation": {"draft": "history"}}
    judged = config(rewards=[{"kind": "model", "model": "rated"}], rollouts=rollouts)
    me = OwnerConfig(token="a/b", lock="lock")
    made: list[Any] = []
    monkeypatch.setattr(sidecar.serve, "status", lambda: SimpleNamespace(applications={}))
    monkeypatch.setattr(sidecar.serve, "run", lambda app, **options: made.append((app, options)))
    monkeypatch.setattr(sidecar, "_own_logs_only", lambda: None)
    arguments = sidecar.serve_config(judged, Path("model"), me).model_dump(mode="json")
    assert arguments["engine"]["speculation"] == {"draft": "history", "tokens": 8}
    sidecar._run("ppo-j", arguments)
    ((app, options),) = made
    api_deployment = app._bound_deployment
    assert options["logging_config"]["enable_access_log"] is False
    served = [
        each._bound_deployment for each in api_deployment.init_args if hasattr(each, "_bound_deployment")
    ]
    assert {each.name for each in served} == {"policy", "reward"}
    for each in [api_deployment, *served]:
        assert each._deployment_config.logging_config is None  # the application's holds
    for each in served:  # a place is counted once: by who holds it
        places = [a for a in each._deployment_config.deployment_actors if a.name == "places"]
        assert [a.init_kwargs for a in places] == ([{"cpus": 0.5}] if local else [])
        assert each.ray_actor_options["num_cpus"] == (0 if local else 0.5)


def test_a_job_has_room_for_its_service_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from escala.jobs.actions import _check_room
    from escala.spec import JobOptions, JobSpec

    def job(workers: int, **changes: Any) -> JobSpec:
        found = config(resources={"workers": workers}, **changes)
        return JobSpec("ppo", "workloads.ppo", JobOptions(), found)

    monkeypatch.setenv("ESCALA_NUM_CPUS", "4")
    monkeypatch.delenv("ESCALA_RAY_ADDRESS", raising=False)
    _check_room(Settings(), job(2, rollouts={"replicas": 2}))  # all of the head's
    with pytest.raises(SpecError, match="and 1 of the rollout service are 5 CPUs"):
        _check_room(Settings(), job(4))
    monkeypatch.setenv("ESCALA_RAY_ADDRESS", "10.0.0.7:6379")
    _check_room(Settings(), job(4))  # a cluster that may grow
