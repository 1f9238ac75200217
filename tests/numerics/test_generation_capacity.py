"""A served mixture whose experts have a capacity: choices and bits of a request are the same alone and in any batch,
cut and recomputed in any way, and its choices are those of the whole model's forward pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from escala.contract.errors import StateError
from tests.numerics.test_generation import (
    LENGTHS,
    Recorder,
    engine_of,
    model_of,
    prompts_of,
    same,
    sampling_params,
    servers_of,
)
from workloads.generation import drawing
from workloads.generation import engine as engine_module
from workloads.generation.engine import Engine
from workloads.generation.expert_counts import CountedRows, ExpertCounts
from workloads.generation.protocol import Request, SamplingParams
from workloads.generation.scheduler import Work
from workloads.model.moe import MixtureOfExperts, mixtures
from workloads.model.transformer import Transformer

Row = tuple[int, int]  # a request's seed, and a position
SPARSE = {"chosen": 1, "experts": 4, "evaluation_capacity_factor": 0.6}
MIXTURES = {
    "one of four": {"moe": SPARSE},
    "two of five, shared": {
        "moe": {"chosen": 2, "experts": 5, "shared_experts": 1, "evaluation_capacity_factor": 0.7},
        "n_kv_heads": 2,
    },
    "some layers": {
        "moe": {"chosen": 2, "experts": 4, "every": 2, "evaluation_capacity_factor": 0.5},
        "n_layers": 4,
    },
    "constant state": {"moe": SPARSE, "attention": "hybrid", "window_tokens": 16, "n_kv_heads": 2},
}


class Choices:
    """What every choice of every request has met, by row and layer; a second time it must be the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: dict[tuple[Row, int], dict[int, bool]] = {}
        self.compared = 0
        self._next: list[Row] = []
        self._now: list[Row] = []
        piece, follow, keep = engine_module._piece, ExpertCounts.follow, CountedRows.keep

        def noted_piece(work: Work) -> Any:
            seed = work.sequence.request.params.seed
            self._next += [(seed, position) for position in range(work.start, work.end)]
            return piece(work)

        def noted_follow(*arguments: Any) -> CountedRows:
            self._now, self._next = self._next, []
            return follow(*arguments)

        def noted_keep(rows: CountedRows, layer: int, experts_NK: Tensor) -> Tensor:
            kept_NK = keep(rows, layer, experts_NK)
            for row, experts, kept in zip(self._now, experts_NK.tolist(), kept_NK.tolist(), strict=True):
                found = dict(zip(experts, kept, strict=True))
                self.compared += (row, layer) in self.kept
                assert self.kept.setdefault((row, layer), found) == found, (row, layer)
            return kept_NK

        monkeypatch.setattr(engine_module, "_piece", noted_piece)
        monkeypatch.setattr(ExpertCounts, "follow", noted_follow)
        monkeypatch.setattr(CountedRows, "keep", noted_keep)

    @property
    def dropped(self) -> float:
        """Share of the choices that found no place."""
        kept = [found for choices in self.kept.values() for found in choices.values()]
        return 1 - sum(kept) / len(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(MIXTURES))
def test_a_request_s_choices_and_bits_are_its_own(
    dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices, bits = Choices(monkeypatch), Recorder()
    monkeypatch.setattr(drawing, "sample", bits)
    model, prompts = model_of(dtype, **MIXTURES[name]), prompts_of()
    params = sampling_params(len(prompts))
    wanted = [engine_of(model).generate([p], q)[0] for p, q in zip(prompts, params, strict=True)]
    rows = sum(LENGTHS) + 13 * len(LENGTHS)  # the last token is not computed
    layers = len(mixtures(model))
    assert len(choices.kept) == rows * layers
    assert 0.2 < choices.dropped < 0.7
    assert choices.compared == 0
    for server, options in servers_of(model).items():
        if "block_tokens" not in options:
            engine = engine_of(model, **options)
            assert same(engine.generate(prompts, params), wanted), server
            stats = engine.stats()
            assert (stats.preemptions > 0) == (server == "preempted")
            assert (stats.cached_prompt_tokens, stats.free_blocks) == (0, stats.total_blocks)
    order = [3, 0, 8, 6, 1, 7, 2, 5, 4]
    engine = engine_of(model, max_running=4)
    again = engine.generate([prompts[i] for i in order] * 2, [params[i] for i in order] * 2)
    assert same(again, [wanted[i] for i in order] * 2)
    assert engine.stats().cached_prompt_tokens == 0
    assert choices.compared > 6 * rows * layers  # in the preempted server some more than once
    assert sorted(engine._scheduler._free_slots) == list(range(4))


@pytest.mark.parametrize("name", list(MIXTURES))
def test_a_request_s_choices_are_those_of_the_whole_forward_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices, whole = Choices(monkeypatch), list[tuple[Tensor, Tensor]]()
    model, prompts = model_of(**MIXTURES[name]).eval(), prompts_of()
    params = sampling_params(len(prompts))
    found = engine_of(model, cache_tokens=80, prefill_tokens=16).generate(prompts, params)
    kept_of = MixtureOfExperts._kept

    def noted(mixture: MixtureOfExperts, experts_NK: Tensor, batch: int) -> Tensor | None:
        kept_NK = kept_of(mixture, experts_NK, batch)
        assert kept_NK is not None
        whole.append((experts_NK, kept_NK))
        return kept_NK

    monkeypatch.setattr(MixtureOfExperts, "_kept", noted)
    layers = [n for n in range(model.config.n_layers) if model.config.has_experts(n)]
    for params_of_one, prompt, one in zip(params, prompts, found, strict=True):
        tokens = [*prompt, *one.token_ids][:-1]
        whole.clear()
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, len(prompt) - 1 :]
        for layer, (experts_NK, kept_NK) in zip(layers, whole, strict=True):
            for position, each in enumerate(zip(experts_NK.tolist(), kept_NK.tolist(), strict=True)):
                theirs = choices.kept[(params_of_one.seed, position), layer]
                assert theirs == dict(zip(*each, strict=True)), (layer, position)
        hot = params_of_one.temperature or 1.0
        expected = (logits / hot).log_softmax(-1).gather(1, torch.tensor(one.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=2e-4, rtol=0)


def served(model: Transformer, factor: float | None) -> Engine:
    """One that was told the factor from the start."""
    if factor is None:
        model = model_of(moe={**SPARSE, "evaluation_capacity_factor": None})
    return engine_of(model, capacity_factor=factor)


def test_the_factor_changes_between_responses() -> None:
    model, prompts = model_of(moe=SPARSE), prompts_of()
    params, prompts = sampling_params(2 * len(prompts)), prompts * 2
    engine, seen = engine_of(model), []
    assert engine.capacity_factor == 0.6
    for version, factor in enumerate((0.6, 1.5, None, 0.6), 1):
        engine.set_capacity_factor(factor, version)
        assert (engine.capacity_factor, engine.weights_version) == (factor, version)
        found = engine.generate(prompts, params)
        assert same(found, served(model, factor).generate(prompts, params))
        assert {one.weights_version for one in found} == {version}
        seen.append([one.token_ids for one in found])
    assert seen[0] == seen[3]
    assert seen[0] != seen[1] != seen[2] != seen[3]
    assert engine.stats().cached_prompt_tokens > 0  # while nothing was dropped
    engine.add(Request("a", (1, 2), SamplingParams(max_tokens=4)))
    engine.step()
    with pytest.raises(StateError, match="1 requests have begun"):
        engine.set_capacity_factor(None, 9)
    assert (engine.capacity_factor, engine.weights_version) == (0.6, 4)


def test_new_weights_keep_the_factor() -> None:
    model, other = model_of(moe=SPARSE), model_of(moe={**SPARSE, "evaluation_capacity_factor": None})
    for weight in other.parameters():
        weight.data *= 1.1
    prompts, params = prompts_of(), sampling_params(len(LENGTHS))
    engine = engine_of(model, capacity_factor=0.8)
    engine.load_weights(other.state_dict(), 1)
    assert engine.capacity_factor == 0.8
    assert same(
        engine.generate(prompts, params), engine_of(other, capacity_factor=0.8).generate(prompts, params)
    )
