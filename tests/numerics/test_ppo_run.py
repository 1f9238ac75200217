"""Whole PPO runs, one engine in place of the rollout service: resumed bit for bit, stopped by name, one step off."""

from __future__ import annotations

from typing import Any

import pytest

from tests.numerics.ranks import run_ranks

STATE = ("measures", "kl_coef", "scores", "actor", "critic", "tokens")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks("ppo_run_scenarios:scenario", 1, tmp_path_factory.mktemp("ppo-run"))[0]


def test_a_stopped_run_ends_as_one_that_was_not(found: Any) -> None:
    straight, resumed = found["resume"]["straight"], found["resume"]["resumed"]
    for key in STATE:
        assert resumed[key] == straight[key], key  # bitwise: normalisation and KL coefficient go on, too
    assert resumed["seeds"] == straight["seeds"][2:]
    assert straight["versions"] == [1, 2, 3, 4]
    assert straight["kl_coef"] != 0.1
    assert straight["scores"]["count"] == 4 * 8


def test_a_checkpoint_leaves_no_iteration_untold(found: Any) -> None:
    assert found["resume"]["told"] == [
        1,
        2,
    ]  # before the worker closes its reporter, which a killed one does not


def test_a_reward_that_fails_is_named_and_the_run_goes_on_from_before(found: Any) -> None:
    failing = found["failing"]
    assert "broken_at_third raised OSError: the grader is gone" in failing["message"]
    assert failing["step"] == 2
    for key in STATE:
        assert failing["after"][key] == found["resume"]["straight"][key], key


def test_one_step_off_draws_ahead_and_says_how_stale_it_is(found: Any) -> None:
    off, straight = found["one_step_off"], found["resume"]["straight"]
    assert off["versions"] == [1, 1, 2, 3]  # iteration 1 is drawn by iteration 0's weights, and so on
    assert off["seeds"] == straight["seeds"]
    assert off["measures"]["staleness_versions"] == 1
    assert straight["measures"]["staleness_versions"] == 0
    assert off["measures"]["engine_gap_nats"] > 100 * straight["measures"]["engine_gap_nats"]


def test_a_frozen_actor_stays_while_its_critic_learns(found: Any) -> None:
    before, warm, end = found["frozen"]
    assert warm["actor"] == before["actor"]
    assert warm["critic"] != before["critic"]
    assert end["actor"] != warm["actor"]  # also from a checkpoint that knows no update of the actor


def test_divergence_is_named(found: Any) -> None:
    assert found["exploded"].startswith("Diverged: before update 2 the policy is")
    assert "kl.limit_nats_per_token 1e-06" in found["exploded"]
    assert found["diverged"].startswith("Diverged: training diverged in iteration 1")


def test_an_early_stop_ends_the_updates(found: Any) -> None:
    assert found["early_steps"] == 2  # of two epochs of one minibatch: the first moves, the second sees it


@pytest.mark.parametrize("name", ["grpo", "reinforce", "loss"])
def test_other_estimators_learn(found: Any, name: str) -> None:
    assert found[name]["actor"] != found["frozen"][0]["actor"]
    assert found[name]["measures"]["kl_k2_nats_per_token"] > 0
    assert ("explained_variance" in found[name]["measures"]) == (name == "loss")


def test_metrics_and_samples_are_recorded(found: Any) -> None:
    metrics = {point[0] for e in found["events"] if e["event"] == "metrics" for point in e["points"]}
    assert metrics >= {
        "reward", "kl_nats", "kl_k1_nats_per_token", "kl_k2_nats_per_token", "kl_k3_nats_per_token", "kl_coef",
        "entropy_nats", "clip_fraction", "explained_variance", "response_tokens", "engine_gap_nats",
        "engine_gap_max_nats",
        "staleness_versions", "rollout_tokens_per_second", "reward_tokens_per_second",
        "assessment_tokens_per_second", "learning_tokens_per_second", "rollout_cpu_seconds",
    }  # fmt: skip
    samples = found["resume"]["straight"]["samples"]
    assert len(samples) == 4 * 4
    assert [type(value) for value in samples[0]] == [int, str, str, float, bool]
