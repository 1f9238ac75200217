"""What every registered kind of attention must do: `escala.schema.attention` beside `workloads.model.attention`.

A kind is tried with its default options, and as `VARIANTS` say. A new one is tried without a change here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import escala.schema.attention
import workloads.model.attention
from escala.schema import ModelConfig
from escala.schema.attention import KINDS
from escala.schema.flops import flops_per_token, parameter_counts, saved_elements_per_token
from escala.schema.pretrained import to_hugging_face
from tests.kind_files import kind_of_two_files
from workloads.generation.engine import Engine
from workloads.generation.protocol import SamplingParams
from workloads.model.attention import make_attention
from workloads.model.attention.registry import decode_state
from workloads.model.rope import RotaryTable, rotate
from workloads.model.transformer import Transformer

CONTEXT = 48
SMALL = {
    "vocab_size": 61,
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "d_ff": 32,
    "max_context_tokens": CONTEXT,
}
LEARNED = {"kind": "learned", "count": 24}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "exact": [{"n_kv_heads": 2}],
    "window": [{"window_tokens": 7, "qk_norm": True}],
    "features": [
        {"n_kv_heads": 2, "features": LEARNED},
        {"n_kv_heads": 1, "features": {"kind": "trigonometric", "count": 512}},
    ],
    "hybrid": [
        {"window_tokens": 16},
        {"window_tokens": 16, "n_kv_heads": 2, "features": LEARNED},
        {"window_tokens": 16, "n_kv_heads": 1, "features": {"kind": "trigonometric", "count": 512}},
    ],
    "nystrom": [
        {"window_tokens": 16, "n_kv_heads": 2, "attention": {"kind": "nystrom", "landmarks": 4}},
        {"window_tokens": 16, "n_kv_heads": 1, "attention": {"kind": "nystrom", "landmarks": 8}},
    ],
}
CASES = [(kind, {"attention": kind, **c}) for kind in KINDS for c in [{}, *VARIANTS.get(kind, [])]]


def _name(kind: str, changes: dict[str, Any]) -> str:
    said = [n if n != "features" else c["kind"] for n, c in changes.items() if n != "attention"]
    return f"{kind}-{'-'.join(said) or 'default'}"


each_kind = pytest.mark.parametrize(("kind", "changes"), CASES, ids=[_name(*case) for case in CASES])


def config_of(changes: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changes})


def model_of(changes: dict[str, Any]) -> Transformer:
    """Large weights, so that a wrong detail shows."""
    torch.manual_seed(0)
    model = Transformer(config_of(changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "embedding" not in name:
                weight.mul_(0.8 if "temperature" in name else 1.5)
    return model


def block_of(config: ModelConfig) -> int:
    return config.attention.block_tokens(config) or 8


def tokens_of(count: int = CONTEXT, rows: int = 2) -> torch.Tensor:
    return torch.randint(61, (rows, count), generator=torch.Generator().manual_seed(1))


@each_kind
def test_decoding_step_by_step_is_the_whole_forward_pass(kind: str, changes: dict[str, Any]) -> None:
    """The module alone, of the second layer: tiles of a block for the first half, then one position after another."""
    model = model_of(changes)
    config, cores = model.config, [block.attention.core for block in model.layers]
    core, block = cores[1], block_of(config)
    torch.manual_seed(2)
    shapes = [(1, CONTEXT, heads, config.head_size) for heads in (config.n_heads, *[config.kv_heads] * 2)]
    q, k, v = (torch.randn(shape) for shape in shapes)
    rotation = RotaryTable(config.head_size, config.rope_base)(CONTEXT, like=q)
    q, k = rotate(q, *rotation), rotate(k, *rotation)
    whole = core.attend(q, k, v, core.prepare(CONTEXT, None, q.device))[0]
    state = decode_state(cores, CONTEXT // block + 2, block, q)
    table = list(range(CONTEXT // block + 1, 0, -1))  # in no order
    grouped = q[0].unflatten(1, (config.kv_heads, -1))
    live, found, half = config.attention.live_blocks(config, block), [], CONTEXT // 2
    for start, end in [(0, half), *((t, t + 1) for t in range(half, CONTEXT))]:
        at = torch.arange(start, end)
        borders = state.plan_borders([table], [range(start, end)])
        places = torch.tensor(table)[at // block], at % block
        state.write(1, *places, k[0, start:end], v[0, start:end], borders)
        queries = min(block, end - start)
        positions = at.view(-1, queries)
        plan = state.plan([table] * len(positions), positions)
        found.append(state.attend(grouped[at].unflatten(0, (-1, queries)), 1, plan).flatten(0, 1))
        if live is not None:
            table[: max(0, end // block - live + 1)] = [-1] * max(0, end // block - live + 1)
    torch.testing.assert_close(torch.cat(found).flatten(1), whole.flatten(1), atol=1e-5, rtol=1e-5)


def kept(state: object) -> int:
    """Bytes of the tensors of a decode state and of its parts, not of the layers' modules that it reads."""
    parts = [x for name, x in vars(state).items() if not isinstance(x, list | tuple)]
    return sum(x.nbytes if isinstance(x, torch.Tensor) else kept(x) for x in parts if hasattr(x, "__dict__"))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_block_has_the_bytes_that_are_said(kind: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(changes)
    config, block = model.config, block_of(model.config)
    like = torch.empty(0, dtype=dtype)
    state = decode_state([each.attention.core for each in model.layers], 5, block, like)
    assert kept(state) == 5 * config.attention.block_bytes(config, block, like.element_size())


@each_kind
def test_a_far_part_that_is_left_out_is_left_out_of_generation(kind: str, changes: dict[str, Any]) -> None:
    model = model_of(changes)
    if not model.config.attention.has_far_part:
        pytest.skip("no far part")
    for layer in model.layers:
        layer.attention.core.is_far_bypassed = True
    prompt = tokens_of(40, 1)[0].tolist()
    engine = Engine(copy.deepcopy(model), None, block_tokens=block_of(model.config))
    (response,) = engine.generate([prompt], SamplingParams(max_tokens=6, temperature=0))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response.token_ids]]))[0, len(prompt) - 1 : -1]
    wanted = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor(response.logprobs), wanted, atol=1e-4, rtol=0)


@each_kind
def test_the_engine_draws_what_the_forward_pass_says(kind: str, changes: dict[str, Any]) -> None:
    model = model_of(changes)
    prompts = [row.tolist()[:n] for row, n in zip(tokens_of(30), (3, 30), strict=True)]
    engine = Engine(copy.deepcopy(model), None, block_tokens=block_of(model.config))
    for prompt, response in zip(
        prompts, engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0)), strict=True
    ):
        tokens = torch.tensor([[*prompt, *response.token_ids]])
        with torch.no_grad():
            logits = model(tokens)[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(response.token_ids)
        wanted = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(response.logprobs), wanted, atol=1e-4, rtol=0)


@each_kind
def test_no_token_sees_a_later_one_or_another_document(kind: str, changes: dict[str, Any]) -> None:
    model, tokens = model_of(changes), tokens_of()
    documents = (torch.arange(CONTEXT) // 20).expand(2, -1)
    with torch.no_grad():
        plain, packed = model(tokens), model(tokens, documents_BT=documents)
        changed = tokens.clone()
        changed[:, 20:] = (changed[:, 20:] + 1) % 61
        torch.testing.assert_close(model(changed)[:, :20], plain[:, :20], atol=1e-5, rtol=1e-5)
        changed = tokens.clone()
        changed[:, :20] = (changed[:, :20] + 1) % 61
        seen = model(changed, documents_BT=documents)
    torch.testing.assert_close(seen[:, 20:], packed[:, 20:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen[:, :20], packed[:, :20])


@each_kind
def test_gradients_are_finite_and_reach_every_weight(kind: str, changes: dict[str, Any]) -> None:
    """In a context with a far part, where the kind has one."""
    model, near = model_of(changes), 0
    if model.config.attention.has_far_part:
        near = model.config.window_tokens or 0
    for recompute in (False, True):
        model.zero_grad()
        model.activation_checkpointing = recompute
        model(tokens_of(near + CONTEXT)).square().mean().backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name
            assert weight.grad.any(), name


@each_kind
def test_what_it_says_that_it_costs(kind: str, changes: dict[str, Any]) -> None:
    """The products that a plain implementation makes are the stated ones, or these and the half of T^2 (and what is
    beyond a window) that a causal kernel may skip.
    """
    config = config_of(changes)
    stated = [config.attention.flops(config, t) for t in (1, CONTEXT, 2 * CONTEXT)]
    assert 0 < stated[0] < stated[1] <= stated[2]
    core = make_attention(config)
    q, k, v = (torch.randn(1, CONTEXT, n, config.head_size) for n in (config.n_heads, *[config.kv_heads] * 2))
    prepared = core.prepare(CONTEXT, None, q.device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        core.attend(q, k, v, prepared)
    counted = counter.get_total_flops() * config.n_layers / CONTEXT
    whole = ModelConfig(**SMALL)
    assert stated[1] <= counted <= max(2 * stated[1], 2 * whole.attention.flops(whole, CONTEXT))
    assert flops_per_token(config, CONTEXT).attention == 3 * stated[1]
    counts = parameter_counts(config).n_total
    assert sum(w.numel() for w in model_of(changes).parameters()) == counts
    assert config.attention.state_elements(config, 8) >= config.attention.state_elements(config, 1) > 0
    assert saved_elements_per_token(config, False).blocks > config.attention.saved_elements(config) > 0


@each_kind
def test_it_is_exported_or_refused_with_a_reason(kind: str, changes: dict[str, Any]) -> None:
    config = config_of(changes)
    reason = config.attention.unexportable(config)
    if reason is None:
        to_hugging_face(config)
        return
    with pytest.raises(ValueError, match="attention") as caught:
        to_hugging_face(config)
    assert reason in str(caught.value)


@each_kind
def test_a_configuration_is_read_as_it_was_written(kind: str, changes: dict[str, Any]) -> None:
    config = config_of(changes)
    plain = config.model_dump(mode="json")
    assert (
        ModelConfig(**plain) == config == ModelConfig(**{**plain, "attention": config.attention.model_dump()})
    )
    assert hash(config) == hash(ModelConfig(**plain))


def test_what_was_written_before_there_were_kinds_is_what_is_written_now() -> None:
    assert ModelConfig().model_dump(mode="json")["attention"] == "exact"


def test_an_unknown_kind_and_an_unknown_option_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="expected tags: 'exact', "):
        ModelConfig(attention="sparse")
    with pytest.raises(ValidationError) as caught:
        ModelConfig(attention={"kind": "exact", "radius": 3})
    assert caught.value.errors()[0]["loc"] == ("attention", "radius")


SCHEMA = """
    from typing import Literal

    from escala.schema.attention.kind import KINDS, AttentionKind


    @KINDS.add
    class MeanAttention(AttentionKind):
        kind: Literal["mean"] = "mean"
        sinks: int = 1

        def flops(self, model, context_tokens):
            return 2.0 * model.n_layers * model.n_heads * model.head_size

        def saved_elements(self, model, element_bytes=4):
            return 2 * model.n_heads * model.head_size

        def state_elements(self, model, tokens, element_bytes=4):
            return model.n_layers * (model.kv_heads * model.head_size + 1)

        def block_bytes(self, model, block_tokens, width):
            return self.state_elements(model, block_tokens) * width
"""
IMPLEMENTATION = """
    import torch


    from workloads.model.attention.registry import AttentionModule


    class MeanCore(AttentionModule):
        def __init__(self, config):
            super().__init__()
            self.groups = config.n_heads // config.kv_heads

        def prepare(self, context_tokens, documents_BT, device):
            return torch.arange(1, context_tokens + 1, device=device).view(1, -1, 1, 1)

        def attend(self, q_BTHS, k_BTGS, v_BTGS, prepared):
            return (v_BTGS.cumsum(1) / prepared).repeat_interleave(self.groups, 2)

        @classmethod
        def decode_state(cls, layers, blocks, block_tokens, like):
            raise NotImplementedError


    make_attention = MeanCore
"""


@pytest.fixture
def mean_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A kind of two files: its schema and what computes it."""
    files = {escala.schema.attention: SCHEMA, workloads.model.attention: IMPLEMENTATION}
    with kind_of_two_files("mean", KINDS, files, tmp_path, monkeypatch) as kind:
        yield kind


def test_a_new_kind_is_two_files(mean_kind: str) -> None:
    config = ModelConfig(**SMALL, attention={"kind": "mean", "sinks": 2})
    assert config.model_dump(mode="json")["attention"] == {"kind": "mean", "sinks": 2}
    assert ModelConfig(**config.model_dump(mode="json")) == config
    assert ModelConfig(**SMALL, attention="mean") != config
    torch.manual_seed(0)
    model = Transformer(config)
    model(tokens_of()).sum().backward()
    near, far = (flops_per_token(config, t).attention for t in (10, 10_000))
    assert near == far == 3 * 2 * 2 * 32
    with pytest.raises(ValueError, match="no class of theirs computes attention mean"):
        to_hugging_face(config)
    with pytest.raises(ValidationError, match="attention mean has no window_tokens"):
        ModelConfig(**SMALL, attention="mean", window_tokens=3)
