"""The engine against the plain forward pass and Hugging Face's `generate`: the same tokens whatever the batch, the
cache's size, the prefixes shared.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable

import pytest
import torch
import transformers
from torch import Tensor, nn

from escala.schema import ModelConfig
from tests.eager import Eager
from workloads.generation import drawing, network
from workloads.generation.engine import Engine
from workloads.generation.network import Network, TokenSpan
from workloads.generation.protocol import Completion, Request, SamplingParams
from workloads.generation.sampling import Draw, sample
from workloads.generation.scheduler import Sequence
from workloads.generation.speculation.drafter import Guess
from workloads.model.attention import paged
from workloads.model.transformer import Transformer

NAMES = {
    "blocks": "model.layers",
    "feed_forward_norm": "post_attention_layernorm",
    "attention_norm": "input_layernorm",
    "final_norm": "model.norm",
    "unembedding": "lm_head",
    "embedding": "model.embed_tokens",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
SMALL = {
    "vocab_size": 97,
    "n_layers": 2,
    "d_model": 64,
    "n_heads": 4,
    "d_ff": 96,
    "max_context_tokens": 96,
    "tie_embeddings": False,
}
LENGTHS = (5, 8, 29, 33, 1, 17, 40, 16, 32)
GREEDY = SamplingParams(max_tokens=14, temperature=0)
SERVERS = {
    "all at once": {},
    "one at a time": {"max_running": 1},
    "preempted": {"cache_tokens": 80, "max_running": 4},
    "pieces of prompts": {"prefill_tokens": 8, "max_running": 3},
    "large blocks": {"block_tokens": 32},
}

KINDS = [
    {"attention": "features", "n_kv_heads": 2, "features": {"kind": "learned", "count": 24}},
    {"attention": "features", "n_kv_heads": 1},
    {"attention": "hybrid", "window_tokens": 16, "n_kv_heads": 2},
    {
        "attention": "hybrid",
        "window_tokens": 16,
        "n_kv_heads": 1,
        "features": {"kind": "trigonometric", "count": 64},
    },
    {"attention": {"kind": "nystrom", "landmarks": 4}, "window_tokens": 16, "n_kv_heads": 2},
]


def servers_of(model: Transformer) -> dict[str, dict[str, int]]:
    """Those that the kind of attention allows; preempted where two short prompts grow."""
    attention, config = model.config.attention, model.config
    fixed, live = attention.block_tokens(config), attention.live_blocks(config, 8)
    servers = {n: each for n, each in SERVERS.items() if fixed is None or "block_tokens" not in each}
    if live is not None:
        servers["preempted"] = {"cache_tokens": 8 * (live + 1), "max_running": 4}
    return servers


def model_of(dtype: torch.dtype = torch.float32, **changes: object) -> Transformer:
    """Large weights: logits far apart, and a wrong detail shows."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SMALL, **changes}))
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.2 * torch.randn_like(weight)
        elif "embedding" not in name:
            weight.data *= 1.5
    return model.to(dtype)


def prompts_of(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]


def engine_of(model: Transformer, **options: object) -> Engine:
    return Engine(copy.deepcopy(model), None, **{"block_tokens": 8, **options})


@torch.no_grad()
def recomputed(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by a full forward pass for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def hugging_face(model: Transformer) -> nn.Module:
    """A Llama with the same weights."""
    config = model.config
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.ff_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_context_tokens,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
    )
    peer = transformers.LlamaForCausalLM(settings).eval()
    theirs = dict(peer.named_parameters())
    for name, weight in model.named_parameters():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        theirs.pop(name).data.copy_(weight)
    assert not theirs
    return peer


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_heads": 2},
        {"qk_norm": True, "n_kv_heads": 1, "head_dim": 32},
        {"window_tokens": 11},
        {"tie_embeddings": True},
        *KINDS,
    ],
)
def test_greedy_tokens_are_those_of_the_plain_forward_pass(changes: dict) -> None:
    model, prompts = model_of(**changes), prompts_of()
    expected = [recomputed(model, p, GREEDY.max_tokens) for p in prompts]
    assert len({tuple(e) for e in expected}) == len(expected)
    for name, options in servers_of(model).items():
        engine = engine_of(model, **options)
        found = engine.generate(prompts, GREEDY)
        assert [list(c.token_ids) for c in found] == expected, name
        assert (engine.stats().preemptions > 0) == (name == "preempted")
        assert engine.stats().free_blocks == engine.stats().total_blocks


def test_greedy_tokens_are_those_of_hugging_face_generate() -> None:
    model, prompts = model_of(n_kv_heads=2), prompts_of()
    peer, width = hugging_face(model), max(LENGTHS)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = {
        "max_new_tokens": GREEDY.max_tokens,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    expected = peer.generate(ids, attention_mask=mask, **settings)[:, width:].tolist()
    found = engine_of(model).generate(prompts, GREEDY)
    assert [list(c.token_ids) for c in found] == expected


def sampling_params(count: int) -> list[SamplingParams]:
    """All kinds in one batch."""
    kinds = (
        {},
        {"temperature": 0.7},
        {"top_k": 9},
        {"top_p": 0.8},
        {"min_p": 0.05, "repetition_penalty": 1.2},
    )
    return [SamplingParams(max_tokens=14, seed=n, **kinds[n % len(kinds)]) for n in range(count)]


class Recorder:
    """`sample`, which also keeps the bits of all logits by (seed, count), and compares them with the first ones."""

    def __init__(self) -> None:
        self.bits: dict[tuple[int, int], Tensor] = {}
        self.compared = 0

    def __call__(self, logits_NV: Tensor, draws: list[Draw]) -> tuple[list[int], list[float]]:
        for row, draw in zip(logits_NV, draws, strict=True):
            key = draw.params.seed, draw.drawn
            self.compared += key in self.bits
            assert torch.equal(self.bits.setdefault(key, row.clone()), row), key
        return sample(logits_NV, draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{"n_kv_heads": 2}, {"window_tokens": 19, "n_heads": 2}, *KINDS])
def test_same_seed_same_bits_whatever_else_runs(
    dtype: torch.dtype, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(drawing, "sample", recorder)
    model, prompts = model_of(dtype, **changes), prompts_of()
    params = sampling_params(len(prompts))
    wanted = engine_of(model, max_running=1).generate(prompts, params)
    for name, options in servers_of(model).items():
        if "block_tokens" not in options:
            engine = engine_of(model, **options)
            assert same(engine.generate(prompts, params), wanted), name
            assert (engine.stats().preemptions > 0) == (name == "preempted")
    order = [3, 0, 8, 6, 1, 7, 2, 5, 4]
    engine = engine_of(model, max_running=4)
    again = engine.generate([prompts[i] for i in order], [params[i] for i in order])
    assert same(again, [wanted[i] for i in order])
    engine = engine_of(model)
    assert same(engine.generate(prompts * 2, params * 2), wanted * 2)
    assert engine.stats().cached_prompt_tokens > 0
    assert recorder.compared == 7 * 9 * 14
    other = engine_of(model, max_running=1).generate(prompts[:1], SamplingParams(max_tokens=14, seed=99))
    assert other[0].token_ids != wanted[0].token_ids


def same(found: list[Completion], wanted: list[Completion]) -> bool:
    """Equal tokens and log-probabilities, to the last bit."""
    return [(c.token_ids, c.logprobs) for c in found] == [(c.token_ids, c.logprobs) for c in wanted]


class FourOfFive:
    """Drafts what will be said, with an error in every fifth token or so."""

    is_costly = False

    def __init__(self, responses: dict[int, tuple[int, ...]]) -> None:
        self._responses, self._errors = responses, random.Random(0)

    def begin(self, sequence: Sequence) -> None:
        pass

    end = begin

    def guesses(self, sequences: Iterable[tuple[Sequence, int]]) -> list[Guess]:
        found = []
        for sequence, most in sequences:
            said = self._responses[sequence.request.params.seed][sequence.generated :][:most]
            tokens = tuple(t if self._errors.random() < 0.8 else (t + 1) % 97 for t in said)
            found.append(Guess(tokens, (0,) * len(tokens)))
        return found


@pytest.mark.parametrize("changes", [{"n_kv_heads": 2}, {"window_tokens": 19, "n_heads": 2}, *KINDS])
def test_drafts_change_no_bit_and_leave_no_trace(changes: dict) -> None:
    model, prompts = model_of(**changes), prompts_of()
    params = sampling_params(len(prompts))
    wanted = engine_of(model).generate(prompts, params)
    responses = {p.seed: c.token_ids for p, c in zip(params, wanted, strict=True)}
    for name in ("all at once", "preempted", "one at a time"):
        speculator = Eager(FourOfFive(responses), 12)
        engine = engine_of(model, **servers_of(model)[name], speculation=speculator)
        assert same(engine.generate(prompts, params), wanted), name
        stats = engine.stats()
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
        assert stats.free_blocks == stats.total_blocks
        assert stats.preemptions == 0 or name == "preempted"


def test_samples_of_one_prompt_share_its_blocks_and_differ_by_seed() -> None:
    model, prompt = model_of(n_kv_heads=2), prompts_of((40,))[0]
    prompts = [prompt, prompt, [*prompt[:24], *prompts_of((20,))[0]], prompt]
    params = [SamplingParams(max_tokens=14, seed=n) for n in range(4)]
    alone = [engine_of(model).generate([p], [q])[0] for p, q in zip(prompts, params, strict=True)]
    engine = engine_of(model)
    assert same(engine.generate(prompts, params), alone)
    assert (
        engine.stats().cached_prompt_tokens == 32 + 24 + 32
    )  # whole blocks; the last token is always computed
    assert engine.stats().prompt_tokens == 40 + 8 + 20 + 8
    assert len({c.token_ids for c in alone}) == 4


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_the_plain_forward_pass(temperature: float) -> None:
    model, prompts = model_of(qk_norm=True, n_kv_heads=2), prompts_of()
    params = SamplingParams(max_tokens=14, temperature=temperature, top_p=0.9, repetition_penalty=1.1, seed=3)
    for prompt, response in zip(
        prompts, engine_of(model, max_running=4).generate(prompts, params), strict=True
    ):
        tokens = torch.tensor([[*prompt, *response.token_ids]])
        with torch.no_grad():
            logits = model(tokens)[0, len(prompt) - 1 : -1] / (temperature or 1.0)
        expected = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, atol=1e-4, rtol=0)


def test_bf16_is_as_near_to_fp32_as_the_plain_forward_pass() -> None:
    exact = model_of(n_kv_heads=2)
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict({n: w.float() for n, w in model.state_dict().items()})
    prompts = prompts_of((33, 40, 29, 17))
    with torch.inference_mode():
        wanted = torch.stack([exact(torch.tensor([p]))[0, -1] for p in prompts])
        plain = torch.stack([model(torch.tensor([p]))[0, -1].float() for p in prompts])
        ours = last_logits(Network(model), prompts)
    error, plain_error = ((x - wanted).square().mean().sqrt() for x in (ours, plain))
    assert 0 < error < 1.5 * plain_error


def last_logits(net: Network, prompts: list[list[int]], block_tokens: int = 8) -> Tensor:
    config = net.config
    blocks = -(-max(map(len, prompts)) // block_tokens)
    cache = net.decode_state(blocks * len(prompts), block_tokens)
    tables = [range(n * blocks, (n + 1) * blocks) for n in range(len(prompts))]
    pieces = [TokenSpan(p, 0, list(t)) for p, t in zip(prompts, tables, strict=True)]
    return net.logits(net.forward(pieces, cache, tiled=True))[:, : config.vocab_size]


def test_groups_of_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, prompts = Network(model_of(n_kv_heads=2)), prompts_of()
    with torch.inference_mode():
        together = last_logits(net, prompts)
        monkeypatch.setattr(network, "GROUP_NUMBERS", 3000)
        assert torch.equal(last_logits(net, prompts), together)


def test_reading_in_place_and_copying_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = model_of(n_kv_heads=2), prompts_of()
    engine = engine_of(model)
    wanted = engine.generate(prompts, GREEDY)
    in_place = engine.cache.copied_blocks
    plain = paged._choose_view
    monkeypatch.setattr(paged, "_choose_view", lambda block, tile, in_place: plain(block, tile, False))
    engine = engine_of(model)
    assert engine.generate(prompts, GREEDY) == wanted
    assert engine.cache.copied_blocks > 2 * in_place


class Mixture(nn.Module):
    """A feed-forward that is not the dense one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BTD: Tensor) -> Tensor:
        assert x_BTD.ndim == 3
        return 0.5 * self.inner(x_BTD) + 0.25 * x_BTD


def test_another_feed_forward_is_called_as_the_module_it_is() -> None:
    model, prompts = model_of(), prompts_of()
    model.blocks[1].feed_forward = Mixture(model.blocks[1].feed_forward)
    expected = [recomputed(model, p, 6) for p in prompts]
    found = engine_of(model).generate(prompts, SamplingParams(max_tokens=6, temperature=0))
    assert [list(c.token_ids) for c in found] == expected


def test_new_weights_are_used_and_no_old_key_is_met() -> None:
    model, prompts = model_of(n_kv_heads=2), prompts_of()
    engine = engine_of(model)
    before = engine.generate(prompts, GREEDY)
    torch.manual_seed(5)
    other = model_of(n_kv_heads=2)
    other.load_state_dict({n: w + 0.1 * torch.randn_like(w) for n, w in model.state_dict().items()})
    engine.add(Request("waiting", tuple(prompts[0]), GREEDY))
    engine.load_weights(other.state_dict(), 1)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [o.token_ids[0] for o in outputs] == recomputed(other, prompts[0], GREEDY.max_tokens)
    assert {o.weights_version for o in outputs} == {1}
    after = engine.generate(prompts, GREEDY)
    assert [list(c.token_ids) for c in after] == [recomputed(other, p, GREEDY.max_tokens) for p in prompts]
    assert [c.token_ids for c in before] != [c.token_ids for c in after]
