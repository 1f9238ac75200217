"""The service's edges without Ray: OpenAI's requests and answers, who may ask, weights as bytes, the configuration."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from fastapi import Request
from pydantic import ValidationError
from ray._common.constants import HEAD_NODE_RESOURCE_NAME

from escala import spec
from escala.contract.errors import CheckpointError, SpecError, WeightsNotLoaded
from escala.hardware import directory
from escala.rollouts import deployment
from escala.rollouts.policy import Rules
from escala.rollouts.weights import Weights, WeightVersion, digest_of
from escala.schema import ModelConfig
from escala.schema.serve import OwnerConfig, ServeConfig
from escala.settings import RolloutsSettings, Settings
from tests.unit.local_service import LocalPolicy
from workloads.generation.engine import Engine
from workloads.generation.protocol import Completion, Output, SamplingParams
from workloads.model.transformer import Transformer
from workloads.serve import application, policy_deployment
from workloads.serving.access import Unauthorized, authorise
from workloads.serving.engine_loading import build_engine, initial_version
from workloads.serving.openai import format_of, server_sent
from workloads.serving.parsing import parse
from workloads.serving.records import Generated, GeneratedChunk
from workloads.serving.schemas import ChatRequest, CompletionRequest
from workloads.serving.stepper import Stepper
from workloads.serving.weights import pack, unpack

SHIPPED = directory() / "services" / "rollouts.yaml"
V3 = WeightVersion(3, "ab" * 16, "fp32")


def request(client: str | None, server: str, host: str, **headers: str) -> Request:
    raw = [(b"host", host.encode()), *((k.encode(), v.encode()) for k, v in headers.items())]
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "scheme": "http",
        "headers": raw,
        "client": (client, 1234) if client else None,
        "server": (server, 8199),
    }
    return Request(scope)


@pytest.mark.parametrize(
    ("client", "server", "host", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:8199", True),
        ("127.0.0.1", "127.0.0.1", "localhost:8199", True),
        ("::1", "::1", "[::1]:8199", True),
        ("10.0.0.7", "127.0.0.1", "localhost", False),
        ("127.0.0.1", "10.0.0.5", "localhost", False),
        ("127.0.0.1", "127.0.0.1", "evil.example", False),  # a web page that resolves its name to 127.0.0.1
        (None, "127.0.0.1", "localhost", False),
    ],
)
def test_without_a_token_only_this_machine_is_answered(
    client: str | None, server: str, host: str, allowed: bool
) -> None:
    asked = request(client, server, host)
    if allowed:
        authorise(asked, None)
    else:
        with pytest.raises(Unauthorized, match="no token"):
            authorise(asked, None)


def test_a_token_is_demanded_of_everybody() -> None:
    wanted = hashlib.sha256(b"a-long-enough-token").hexdigest()
    authorise(request("10.0.0.7", "10.0.0.5", "host", authorization="Bearer a-long-enough-token"), wanted)
    for headers in ({}, {"authorization": "Bearer another"}, {"authorization": wanted}):
        with pytest.raises(Unauthorized, match="missing or wrong"):
            authorise(request("127.0.0.1", "127.0.0.1", "localhost", **headers), wanted)


def test_requests_become_sampling_parameters_a_seed_each() -> None:
    body = {"prompt": [[1, 2], [3]], "n": 2, "seed": 7, "stop": "x", "temperature": 0.5, "top_k": 4}
    asked = parse(CompletionRequest, json.dumps(body).encode())
    assert asked.prompts() == [[1, 2], [3]]
    assert [(p.seed, p.stop, p.temperature, p.top_k, p.max_tokens) for p in asked.sampling(9)] == [
        (7, ("x",), 0.5, 4, 9),
        (8, ("x",), 0.5, 4, 9),
    ]
    unseeded = parse(CompletionRequest, b'{"prompt": "a"}')
    assert unseeded.sampling(1)[0].seed != unseeded.sampling(1)[0].seed


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "maximum": 3}, "maximum: is not served here"),
        ({"prompt": "a", "n": 0}, "n:"),
        ({}, "prompt"),
    ],
)
def test_what_is_not_served_is_refused_by_name(body: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse(CompletionRequest, json.dumps(body).encode())


def test_chat_limits_that_differ_and_bodies_that_are_no_json_are_refused() -> None:
    both = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "max_completion_tokens": 4}
    with pytest.raises(SpecError, match="differ"):
        parse(ChatRequest, json.dumps(both).encode())
    with pytest.raises(SpecError, match="JSON"):
        parse(ChatRequest, b"{")


def test_answers_carry_their_weights_the_oldest_of_several() -> None:
    asked = parse(CompletionRequest, b'{"prompt": "a", "logprobs": 0}')
    newer = WeightVersion(4, "cd" * 16, "fp32")
    choices = [
        Generated(Completion((5, 6), (-0.5, -0.25), "ab", "stop", v.version), v, 3) for v in (newer, V3)
    ]
    body = format_of("m", asked).body(choices, 3)
    assert (body["weights_version"], body["system_fingerprint"]) == (3, "v3-abababab-fp32")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -0.25]
    given = GeneratedChunk(Output("r", (5,), (-0.5,), "é", None, 3), V3, 3)
    chat = format_of("m", parse(ChatRequest, b'{"messages": [{"role": "user", "content": "a"}]}'))
    event = json.loads(server_sent(chat.chunk(0, given, first=True)).removeprefix("data: "))
    assert event["choices"][0]["delta"] == {"role": "assistant", "content": "é"}
    assert (event["object"], event["weights_version"]) == ("chat.completion.chunk", 3)


def test_state_dicts_go_to_bytes_and_back_without_a_copy() -> None:
    state = {
        "b": torch.randn(3, 4).bfloat16(),
        "a": torch.randn(2, 5).T,
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "whole": torch.arange(6),
    }
    packed = pack(state)
    found = unpack(packed)
    assert [e.name for e in packed.entries] == sorted(state)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in state.items())
    assert found["b"].data_ptr() == state["b"].data_ptr()
    assert digest_of(packed) == digest_of(pack(found))
    with pytest.raises(CheckpointError, match="a is not"):
        unpack(Weights(packed.entries, (packed.buffers[0][:-1], *packed.buffers[1:])))


def test_what_is_sent_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESCALA_ROLLOUTS_TOKEN", "ESCALA_ROLLOUTS_HOST"):
        monkeypatch.delenv(name, raising=False)
    document = deployment.read([SHIPPED], ["model=/models/m", "scaling.max_replicas=3"])
    rollouts = RolloutsSettings(token="sixteen-or-more-characters")
    sent = deployment.prepare(document["applications"][0], "mine", Settings(), rollouts)
    assert (sent["name"], sent["args"]["model"]) == ("mine", "/models/m")
    assert sent["args"]["token_sha256"] == hashlib.sha256(b"sixteen-or-more-characters").hexdigest()
    assert "sixteen" not in json.dumps(sent)  # arguments are shown in dashboards
    (override,) = sent["deployments"]
    scaling = override["autoscaling_config"]
    assert (override["name"], scaling["min_replicas"], scaling["max_replicas"]) == ("policy", 1, 3)
    arguments = scaling["policy"]["policy_kwargs"]
    assert arguments.pop("governor") is None
    assert arguments.pop("rates")["gco2e_per_kwh"] > 0  # of the cluster's file
    assert Rules(**arguments)  # the hook's other arguments are the policy's
    wrong = deployment.read([], ["model=/m", "engine.max_runing=3"])
    with pytest.raises(SpecError, match="did you mean max_running"):
        deployment.prepare(wrong["applications"][0], "mine", Settings(), RolloutsSettings())


def test_the_shipped_file_is_one_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    document = yaml.safe_load(SHIPPED.read_text())
    assert ServeDeploySchema.model_validate(document).applications[0].import_path == deployment.IMPORT_PATH
    spec.load_rollouts(document["applications"][0]["args"])


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7", "example.com", "::"])
def test_an_address_beyond_this_machine_needs_a_token(host: str) -> None:
    with pytest.raises(SpecError, match="ESCALA_ROLLOUTS_TOKEN"):
        deployment.check_exposure(host, {"token_sha256": None})
    deployment.check_exposure(host, {"token_sha256": "0" * 64})
    deployment.check_exposure("127.0.0.1", {})
    with pytest.raises(SpecError, match="ESCALA_ROLLOUTS_TOKEN"):
        RolloutsSettings(token="short")


def test_files_of_other_applications_and_bounds_that_cannot_hold_are_refused(tmp_path: Any) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("applications: [{import_path: 'a:b'}]")
    with pytest.raises(SpecError, match="of the rollout service"):
        deployment.read([other], [])
    for bounds in ((2, 1, 8.0), (0, 0, 8.0), (-1, 2, 8.0), (1, 2, 0.0)):
        with pytest.raises(SpecError, match="cannot hold"):
            deployment.check_bounds(*bounds)


def test_a_judge_replica_prefers_the_same_response_in_either_place(tmp_path: Any) -> None:
    from escala.schema import ModelConfig
    from workloads.data.tokenizer import train_tokenizer
    from workloads.model.huggingface import save_pretrained
    from workloads.model.transformer import Transformer
    from workloads.serving.scores import JudgeReplica

    config = ModelConfig(vocab_size=300, n_layers=1, d_model=32, n_heads=2, max_context_tokens=1024)
    torch.manual_seed(0)
    save_pretrained(Transformer(config), tmp_path)
    train_tokenizer(["A B which answer is better"], 300).save(str(tmp_path / "tokenizer.json"))

    async def ask() -> tuple[list[float], list[float]]:
        judge = JudgeReplica.__new__(JudgeReplica)
        await judge.__init__({"model": str(tmp_path), "judge": {"model": str(tmp_path)}})  # type: ignore[misc]
        prompts, first, second = ["p", [{"role": "user", "content": "q"}]], ["good", "a"], ["bad", "b"]
        return await judge.compare(prompts, first, second), await judge.compare(prompts, second, first)

    one, other = asyncio.run(ask())
    assert all(0 < p < 1 and p != 0.5 for p in one)
    assert other == pytest.approx([1 - p for p in one])


def test_what_reserves_nothing_stays_on_the_head_where_it_holds_no_node_that_could_go() -> None:
    config = ServeConfig(model="somewhere", replica_cpus=2)
    (store,) = policy_deployment(config)._deployment_config.deployment_actors
    api = application(config.model_dump(mode="json"))._bound_deployment
    for options in (store.actor_options, api.ray_actor_options):
        assert (options["num_cpus"], options["resources"]) == (0, {HEAD_NODE_RESOURCE_NAME: 0.001})
    assert policy_deployment(config).ray_actor_options["num_cpus"] == 2
    assert store.init_kwargs["has_owner"] is False
    owned = config.model_copy(update={"owner": OwnerConfig(token="a/b", lock="/l")})
    assert policy_deployment(owned)._deployment_config.deployment_actors[0].init_kwargs["has_owner"] is True
    held = policy_deployment(config.model_copy(update={"hold_places": True}))
    _, places = held._deployment_config.deployment_actors
    assert (held.ray_actor_options["num_cpus"], places.init_kwargs) == (0, {"cpus": 2.0})
    with_gpus = policy_deployment(config.model_copy(update={"hold_places": True, "replica_gpus": 1}))
    assert with_gpus.ray_actor_options["num_cpus"] == 2  # who reserves a GPU is given one


def mixture(factor: float | None = None) -> Transformer:
    torch.manual_seed(0)
    moe = {"experts": 4, "chosen": 2, "evaluation_capacity_factor": factor}
    return Transformer(
        ModelConfig(vocab_size=11, n_layers=1, d_model=8, n_heads=1, max_context_tokens=64, moe=moe)
    )


@pytest.mark.parametrize("own", [None, 1.5])
@pytest.mark.parametrize("told", [None, 1.25])
def test_the_weight_version_of_a_mixture_says_whether_it_drops_tokens(
    own: float | None, told: float | None
) -> None:
    config = ServeConfig(model="m", capacity_factor=told)
    engine = build_engine(mixture(own), None, config)  # type: ignore[arg-type]
    version = initial_version("ab" * 16, "fp32", engine)
    assert (version.precision, version.capacity_factor) == ("fp32", told or own)
    assert version.kernels == engine.kernels


def test_a_capacity_factor_is_refused_where_it_cannot_be_had() -> None:
    dense = Transformer(ModelConfig(vocab_size=11, n_layers=1, d_model=8, n_heads=1))
    with pytest.raises(SpecError, match=r"dense model has no experts to limit by capacity factor 1\.5"):
        build_engine(dense, None, ServeConfig(model="m", capacity_factor=1.5))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="greater than 0"):
        ServeConfig(model="m", capacity_factor=0)
    drafts = ServeConfig(model="m", capacity_factor=1.5, engine={"speculation": {"draft": "ngram"}})
    with pytest.raises(SpecError, match="can't serve a mixture that drops"):
        build_engine(mixture(), None, drafts)  # type: ignore[arg-type]


def test_a_replica_takes_another_capacity_factor_with_and_without_weights() -> None:
    async def test(policy: LocalPolicy) -> None:
        engine, prompt = policy.stepper.engine, [1, 2, 3, 4, 5, 6]
        params = SamplingParams(max_tokens=20, seed=1)
        running = asyncio.create_task(policy.stepper.complete(prompt, params))
        while not policy.stepper.stats.started:
            await asyncio.sleep(0.001)
        await policy._apply(replace(first, version=1, capacity_factor=0.5), None)
        assert (await running).weights_version == 0  # it has ended first
        assert (engine.capacity_factor, engine.weights_version) == (0.5, 1)
        found = await policy.stepper.complete(prompt, params)
        wanted = Engine(mixture(), None, capacity_factor=0.5).generate([prompt], params)[0]
        assert (found.token_ids, found.logprobs) == (wanted.token_ids, wanted.logprobs)

        other = {name: weight * 1.5 for name, weight in mixture().state_dict().items()}
        await policy._apply(replace(first, version=2, digest="cd" * 16, capacity_factor=2.0), pack(other))
        assert (engine.capacity_factor, engine.weights_version) == (2.0, 2)
        assert [policy._versions[v].name for v in (1, 2)] == [
            "v1-abababab-fp32-cf0.5",
            "v2-cdcdcdcd-fp32-cf2",
        ]

        wrong = dict(list(other.items())[1:])
        with pytest.raises(CheckpointError):
            await policy._apply(replace(first, version=3, capacity_factor=0.25), pack(wrong))
        with pytest.raises(SpecError, match="out of range"):
            await policy._apply(replace(first, version=3, capacity_factor=-1.0), pack(other))
        assert (engine.capacity_factor, engine.weights_version) == (2.0, 2)  # nothing is half new
        with pytest.raises(WeightsNotLoaded, match="of precision bf16; this deployment serves fp32"):
            await policy._apply(replace(first, version=3, precision="bf16"), None)

    async def main() -> None:
        policy = LocalPolicy.__new__(LocalPolicy)
        policy.stepper = Stepper(Engine(mixture(), None))
        policy._versions = {0: first}
        try:
            await asyncio.wait_for(test(policy), 30)
        finally:
            await policy.stepper.close()

    first = WeightVersion(0, "ab" * 16, "fp32")
    asyncio.run(main())


def test_a_replica_asks_for_no_capacity_factor_that_it_could_not_serve() -> None:
    asked: list[float | None] = []

    class Remote:
        async def remote(self, factor: float | None) -> WeightVersion:
            asked.append(factor)
            return replace(V3, capacity_factor=factor)

    def policy_of(model: Transformer) -> LocalPolicy:
        policy = LocalPolicy.__new__(LocalPolicy)
        policy.stepper = SimpleNamespace(engine=Engine(model, None))  # type: ignore[assignment]
        policy._store = lambda: SimpleNamespace(set_capacity=Remote())  # type: ignore[method-assign]
        return policy

    dense = Transformer(ModelConfig(vocab_size=11, n_layers=1, d_model=8, n_heads=1))
    with pytest.raises(SpecError, match="dense model"):
        asyncio.run(policy_of(dense).set_capacity(1.0))
    assert asked == []
    assert asyncio.run(policy_of(mixture()).set_capacity(1.0)).capacity_factor == 1.0


def test_weights_for_other_kernels_are_refused_by_name() -> None:
    policy = LocalPolicy.__new__(LocalPolicy)
    policy._versions = {0: WeightVersion(0, "ab" * 16, "fp32", None, "fp32=plain/plain")}
    policy.stepper = SimpleNamespace(engine=SimpleNamespace(kernels="fp32=plain/plain"))  # type: ignore[assignment]
    others = WeightVersion(1, "ab" * 16, "fp32", None, "fp32=vector/plain")
    with pytest.raises(
        WeightsNotLoaded, match="for the kernels fp32=vector/plain; this deployment has fp32=plain"
    ):
        asyncio.run(policy._apply(others, Weights((), ())))
