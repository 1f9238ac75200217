"""The rollout service on the session's cluster: versions of weights, killed replicas, a burst, OpenAI's client."""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch

from escala import Escala
from escala.contract.errors import DigestMismatch, NotFoundError, StaleWeights, WeightsNotLoaded
from escala.schema import ModelConfig
from escala.views.rollouts import DeploymentView, ReplicaView
from tests.conftest import free_ports, wait_for
from tests.integration.followers import Follower, Learner
from workloads.data.tokenizer import train_tokenizer
from workloads.generation.engine import Engine
from workloads.generation.protocol import SamplingParams
from workloads.model.huggingface import save_pretrained
from workloads.model.transformer import Transformer
from workloads.serving.records import Generated

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]

CONFIG = ModelConfig(vocab_size=512, n_layers=2, d_model=64, n_heads=2, max_context_tokens=1024)
SHORT = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
BATCH = 2
UP_SECONDS, DOWN_SECONDS = 1.0, 4.0


# A plant that nobody measured: of stable gains, for a promise that the burst breaks.
GOVERNOR = """
target_seconds: 5.0
window_seconds: 1.0
kp: 0.2
ki: 0.1
plant: {gain: 0.5, time_constant: 1.0, delay: 3.0}
power_shares: [1.0, 0.9]
"""


def model(seed: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG).eval()


def expected(seed: int, prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
    return Engine(model(seed), None, threads=None).generate([prompt], params)[0].token_ids


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rollouts") / "tiny"
    save_pretrained(model(0), path)
    train_tokenizer([inspect.getsource(argparse)], CONFIG.vocab_size).save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def rollouts(connected: None, directory: Path) -> Iterator[Any]:
    """The service, started as a user starts it, and its Python client."""
    from workloads.serving.client import Rollouts

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESCALA_ROLLOUTS_PORT", str(free_ports(1)[0]))
        scaling = f"{{max_replicas: 2, up_seconds: {UP_SECONDS}, down_seconds: {DOWN_SECONDS}}}"
        reward = "[{kind: function, function: 'tests.reward_functions:lengths'}]"
        settings = [
            f"model={directory}",
            f"scaling={scaling}",
            f"engine.max_running={BATCH}",
            "replica_cpus=0.1",
        ]
        file = directory.parent / "governor.yaml"
        file.write_text(GOVERNOR)
        found = Escala().rollouts_up((), [*settings, f"reward={reward}"], report=print, governor=file)
        assert (found.status, {d.name for d in found.deployments}) == ("RUNNING", {"api", "policy", "reward"})
        yield Rollouts()
        Escala().rollouts_down(report=print)
    assert Escala().rollouts_status().status == "ABSENT"


def policy() -> DeploymentView:
    return next(d for d in Escala().rollouts_status(weights=False).deployments if d.name == "policy")


def running() -> list[ReplicaView]:
    return [r for r in policy().replicas if r.state == "RUNNING"]


def in_background(call: Callable[[], Any]) -> Any:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def test_openai_client_and_who_may_ask(rollouts: Any) -> None:
    address = Escala().rollouts_status().address
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["tiny"]
    raw = client.completions.with_raw_response.create(
        model="tiny",
        prompt=[5, 6, 7],
        max_tokens=16,
        temperature=0,
        logprobs=0,
        extra_body={"ignore_eos": True},
    )
    plain = raw.parse()
    wanted = expected(0, [5, 6, 7], SHORT)
    assert plain.choices[0].logprobs.tokens == [f"token_id:{token}" for token in wanted]
    assert plain.usage.completion_tokens == 16
    assert raw.headers["x-escala-weights-version"] == "0"
    assert plain.system_fingerprint.startswith("v0-")

    chat: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 12,
        "seed": 3,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**chat).choices[0].message.content
    events = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].delta.content for e in events[:-1]) == whole
    assert (events[-2].choices[0].finish_reason, events[-1].usage.completion_tokens) == ("length", 12)

    with pytest.raises(openai.ConflictError, match="Version 7 is asked for"):
        client.completions.create(model="tiny", prompt="a", extra_body={"min_version": 7})
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        client.completions.create(model="tiny", prompt="a", frequency_penalty=1.0)
    elsewhere = urllib.request.Request(f"{address}/v1/models", headers={"Host": "example.com"})
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(elsewhere)
    page = urllib.request.Request(f"{address}/v1/models", headers={"Origin": "http://example.com"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(page)
    for replica in (r for d in Escala().rollouts_status(weights=False).deployments for r in d.replicas):
        assert {c.laddr.ip for c in listening(replica.pid)} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert rollouts.score(["p", "p"], ["abc", ""]) == [3.0, 0.0]
    with pytest.raises(NotFoundError, match="no judge"):
        rollouts.compare(["p"], ["a"], ["b"])


def test_the_service_says_what_it_used_and_what_its_governor_wants(rollouts: Any) -> None:
    rollouts.generate([[1, 2]] * 4, SHORT)

    def used() -> Any:
        found = Escala().rollouts_status().used
        return found if found and found["record"].get("tokens") and found["replicas"] else None

    found = wait_for(used, 60, "the accounts")
    record, (note,) = found["record"], found["replicas"].values()
    assert record["joules"] > 0
    assert record["energy_source"] == ("counter" if note["energy"] == "counter" else "estimate")
    assert record["joules_per_token"] == pytest.approx(record["joules"] / record["tokens"])
    assert set(record["replicas"]) == {r.id for r in running()}
    assert record["targets"]["min_replicas"] >= 1
    assert not record["targets"]["held"]
    assert note["power"] != "not asked for"
    if note["power"].startswith("not available"):
        assert record["targets"]["power_share"] is None
        assert "power refused" in record["targets"]["reason"]


def listening(pid: int | None) -> list[Any]:
    return [c for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]


def test_clients_that_leave_end_their_own_requests_only(rollouts: Any) -> None:
    """Sockets that are closed before, while, and after the request is added; both ways to ask."""
    host, port = (Escala().rollouts_status(weights=False).address or "").removeprefix("http://").split(":")
    staying = in_background(lambda: rollouts.generate([[7, 8]], SHORT))
    for number in range(12):
        body = f'{{"prompt": [1, 2], "max_tokens": 1000, "ignore_eos": true, "stream": {str(number % 2 > 0).lower()}}}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            if number % 3:
                time.sleep(0.05 * number)  # the moment of leaving is what is tried
    assert staying.result(120)[0].completion.token_ids == expected(0, [7, 8], SHORT)
    wait_for(lambda: not busy(rollouts), 60, "who left holds no place")
    assert rollouts.generate([[7, 8]], SHORT)[0].completion.token_ids == expected(0, [7, 8], SHORT)


def test_published_weights_are_those_of_the_responses(rollouts: Any) -> None:
    published = rollouts.publish(model(1).state_dict(), 1)
    assert len(published.replicas) == 1
    prompts = [[i + 1, 9] for i in range(6)]
    found = rollouts.generate(prompts, SHORT, min_version=1, max_staleness=0)
    assert [g.completion.token_ids for g in found] == [expected(1, p, SHORT) for p in prompts]
    assert {g.weights for g in found} == {published.weights}
    with pytest.raises(StaleWeights, match="the newest is 1"):
        rollouts.generate([[1]], SHORT, min_version=2)
    with pytest.raises(StaleWeights, match="Give 2 or more"):
        rollouts.publish(model(2).state_dict(), 1)
    assert Escala().rollouts_status().weights["newest"] == 1


def test_a_replica_killed_while_it_generates_syncs_and_starts_loses_no_answer_and_serves_nothing_stale(
    rollouts: Any,
) -> None:
    """The kill hits a replica that generates under version 1 and owes version 2; its successor is killed as well."""
    first = running()[0].pid
    answer = in_background(lambda: rollouts.generate([[3, 4]] * BATCH, LONG))
    wait_for(lambda: busy(rollouts), 30, "the long responses have begun", every=0.02)
    publishing = in_background(lambda: rollouts.publish(model(2).state_dict(), 2))
    wait_for(lambda: newest(rollouts) == 2, 30, "version 2 is announced", every=0.02)
    assert not publishing.done()  # the replica finishes its responses first
    os.kill(first, signal.SIGKILL)
    assert publishing.result(60).replicas == ()  # nobody is left who would have to load it

    def starting() -> int | None:
        pids = [r.pid for r in policy().replicas if r.state == "STARTING" and r.pid]
        return next((pid for pid in pids if pid != first), None)

    os.kill(wait_for(starting, 90, "its successor starts", every=0.05), signal.SIGKILL)
    found: list[Generated] = answer.result(240)
    assert [g.completion.token_ids for g in found] == [expected(2, [3, 4], LONG)] * BATCH
    assert [g.weights.version for g in found] == [2] * BATCH


def busy(rollouts: Any) -> bool:
    return bool(rollouts.describe()["started"])


def newest(rollouts: Any) -> int:
    import ray

    return int(ray.get(rollouts.store().newest.remote()))


@pytest.mark.nightly(minutes=1)
def test_a_burst_brings_a_replica_and_takes_it_away_again_without_a_failed_request(rollouts: Any) -> None:
    before = rollouts.describe()["weights"].version
    started = time.monotonic()
    sent = in_background(lambda: rollouts.generate([[i + 1, 2] for i in range(10)], LONG))
    wait_for(lambda: policy().target_replicas == 2, 15, "the first reaction")
    print(f"first reaction after {time.monotonic() - started:.1f} s")
    stop, count = threading.Event(), [0]

    def keep_busy() -> list[Generated]:
        found: list[Generated] = []
        while not stop.is_set():
            found += rollouts.generate([[count[0] % 500 + 1, 7]] * 4, LONG)
            count[0] += 1
        return found

    more = in_background(keep_busy)
    wait_for(lambda: len(running()) == 2, 120, "two replicas", every=0.3)
    print(f"two replicas after {time.monotonic() - started:.1f} s")
    late = rollouts.publish(model(3).state_dict(), 3)
    assert len(late.replicas) == 2
    stop.set()
    answers = [*sent.result(240), *more.result(240)]
    assert all(len(g.completion.token_ids) == LONG.max_tokens for g in answers)
    assert {g.weights.version for g in answers} <= {before, 3}
    wait_for(lambda: policy().target_replicas == 1, 60, "one replica again", every=0.3)
    assert rollouts.generate([[1, 2]], SHORT, min_version=3)[0].weights.version == 3


@pytest.mark.nightly(minutes=1)
def test_bounds_move_without_a_restart_and_an_idle_policy_goes_and_comes_back(rollouts: Any) -> None:
    before = {r.pid for r in running()}
    wait_for(lambda: Escala().rollouts_status().status == "RUNNING", 60, "quiet")
    found = Escala().rollouts_scale(max_replicas=3, requests_per_replica=5)
    moved = next(d for d in found.deployments if d.name == "policy")
    assert (moved.min_replicas, moved.max_replicas, moved.requests_per_replica) == (1, 3, 5.0)
    wait_for(lambda: Escala().rollouts_status().status == "RUNNING", 60, "running with its new bounds")
    assert {r.pid for r in running()} <= before
    version = newest(rollouts)
    Escala().rollouts_scale(min_replicas=0)
    wait_for(lambda: not policy().replicas, 60, "no replica", every=0.3)
    assert (
        rollouts.generate([[1, 2]], SHORT)[0].weights.version == version
    )  # held at the ingress; pulled at start-up


def test_a_silent_replica_is_replaced_and_named_and_weights_outlive_their_learner(connected: None) -> None:
    import ray

    from escala.rollouts.store import Store

    def follower(name: str, hangs: bool = False, digest: str = "0" * 32) -> Any:
        actor = ray.remote(Follower).options(name=name, namespace="followers", num_cpus=0).remote()
        ray.get(actor.start.remote(store, name, digest, hangs))
        return actor

    store = ray.remote(Store).options(num_cpus=0, max_concurrency=100).remote(uuid.uuid4().hex)
    good, silent = follower("good"), follower("silent", hangs=True)
    learner = ray.remote(Learner).options(num_cpus=0).remote()
    with pytest.raises(WeightsNotLoaded, match="replaced: followers/silent"):
        ray.get(learner.publish.remote(store, 1, 1, 2.0))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(silent.version.remote())
    assert ray.get(good.version.remote()) == 1
    assert ray.get(learner.publish.remote(store, 2, 2, 60.0)) == ("followers/good",)
    ray.kill(learner)
    assert ray.get(follower("late").version.remote()) == 2  # from the store's own copy
    with pytest.raises(DigestMismatch, match="same model files"):
        follower("other", digest="1" * 32)
