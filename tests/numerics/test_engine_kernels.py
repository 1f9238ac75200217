"""The engine's products: every kernel against the dequantised matrix, rows that no batch changes, choices, engines
whose matrices are stored smaller.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from escala.contract.errors import CheckpointError, SpecError
from escala.schema import ModelConfig
from escala.schema.compression import MatrixChoice, QuantizationConfig
from workloads.generation import kernel_choice
from workloads.generation.engine import Engine
from workloads.generation.kernel_choice import EngineLimits, Pair, Product
from workloads.generation.linear import KERNELS, Matrix, cancelling, form_of
from workloads.generation.network import MEASURED, Smaller
from workloads.generation.protocol import SamplingParams
from workloads.generation.row_counts import probe
from workloads.model.compression.layers import (
    CompressedMatrix,
    compress,
    compress_model,
    decompress_model,
    matrices,
)
from workloads.model.transformer import Transformer

CHOICES = {
    "int8": MatrixChoice(bits=8),
    "int8g32": MatrixChoice(bits=8, group=32),
    "int4g32": MatrixChoice(bits=4, group=32, method="round"),
    "int4g64": MatrixChoice(bits=4, group=64, method="round"),
    "int3g32": MatrixChoice(bits=3, group=32, method="round"),
    "half": MatrixChoice(bits=16),
}
FORMS = ["fp32", "bf16", *CHOICES]
LIMITS = EngineLimits(rows=32, tile_rows=128)
SIZES = (1, 2, 3, 5, 7, 13, 31, 32, 33, 70, 130)
SMALL = {"vocab_size": 97, "n_layers": 2, "d_model": 64, "n_heads": 4, "d_ff": 96, "max_context_tokens": 96}


def matrix_of(form: str) -> Matrix:
    torch.manual_seed(0)
    weight_OI = torch.randn(96, 192) / 14
    if form == "fp32":
        return weight_OI
    if form == "bf16":
        return weight_OI.bfloat16()
    matrix = compress(weight_OI, CHOICES[form])
    assert not hasattr(matrix, "left_OR")
    return matrix  # type: ignore[return-value]


@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_multiplies_and_no_row_depends_on_the_others(form: str) -> None:
    matrix = matrix_of(form)
    assert form_of(matrix) == form
    whole_OI = matrix if isinstance(matrix, Tensor) else matrix.dequantize()
    x_NI = torch.randn(SIZES[-1], 192).to(whole_OI.dtype)
    wanted_NO = F.linear(x_NI.double(), whole_OI.double())
    able = [n for n, k in KERNELS.items() if kernel_choice.counts_of(k, matrix, LIMITS) is not None]
    assert {"plain", "vector"} <= set(able)
    for name in able:
        product = Product(matrix, Pair(name, name), LIMITS)
        with torch.inference_mode():
            found_NO = product(x_NI)
            rough = whole_OI.dtype == torch.bfloat16 or ("pack" in name and name != "packed")
            torch.testing.assert_close(found_NO.double(), wanted_NO, atol=0.03 if rough else 2e-3, rtol=0)
            for size in SIZES:
                assert torch.equal(product(x_NI[:size]), found_NO[:size]), (name, size)
                assert torch.equal(product(x_NI[-size:]), found_NO[-size:]), (name, size)


def planted(bad: object) -> object:
    """A product whose last row is off by a bit where `bad` says so of the number of rows."""
    weight_OI = torch.randn(64, 48)

    def multiply(x_NI: Tensor) -> Tensor:
        y_NO = torch.cat([F.linear(x_1I, weight_OI) for x_1I in torch.split(x_NI, 1)])
        if bad(len(x_NI)):  # type: ignore[operator]
            y_NO[-1] *= 1 + 2e-7
        return y_NO

    return multiply


@pytest.mark.parametrize(
    ("bad", "missing"),
    [(lambda n: n < 4, {1, 2, 3}), (lambda n: n % 6 == 1, {1, 7, 13, 31}), (lambda n: n > 32, {64, 128})],
)
def test_the_probe_finds_a_kernel_that_adds_up_otherwise_for_some_numbers_of_rows(
    bad: object, missing: set
) -> None:
    multiply = planted(bad)
    counts = probe(multiply, 48, torch.float32, 128)  # type: ignore[arg-type]
    assert counts is not None
    assert not counts.free
    assert not missing & set(counts.good)
    x_NI = torch.randn(130, 48)
    wanted_NO = planted_free(multiply, x_NI)
    for size in (1, 2, 7, 13, 31, 33, 70, 130):
        assert torch.equal(counts.apply(multiply, x_NI[:size]), wanted_NO[:size])  # type: ignore[arg-type]


def planted_free(multiply: object, x_NI: Tensor) -> Tensor:
    return torch.cat([multiply(x) for x in torch.split(F.pad(x_NI, (0, 0, 0, 6)), 8)])[: len(x_NI)]  # type: ignore[operator]


@pytest.mark.parametrize("form", FORMS)
def test_a_result_in_16_bits_does_not_hide_how_it_was_added_up(form: str) -> None:
    made = cancelling(matrix_of(form))
    assert form_of(made) == form
    weight_OI = made if isinstance(made, Tensor) else made.dequantize()
    seen = probe(rounded_by_rows(weight_OI), weight_OI.shape[1], weight_OI.dtype, 128)  # type: ignore[arg-type]
    assert seen is not None
    assert not {1, 2, 3} & set(seen.good)
    assert {4, 8, 32, 128} <= set(seen.good)


def rounded_by_rows(weight_OI: Tensor) -> object:
    """A product rounded to bf16 that adds up a row otherwise where there are fewer than four."""

    def multiply(x_NI: Tensor) -> Tensor:
        if len(x_NI) < 4:
            return (x_NI.double() @ weight_OI.double().mT).bfloat16()
        rows = torch.split(x_NI.float(), 1)
        return torch.cat([F.linear(x_1I, weight_OI.float()) for x_1I in rows]).bfloat16()

    return multiply


def test_a_kernel_that_adds_up_otherwise_for_all_is_refused() -> None:
    assert probe(planted(lambda n: True), 48, torch.float32, 128) is None  # type: ignore[arg-type]
    free = probe(planted(lambda n: False), 48, torch.float32, 128)  # type: ignore[arg-type]
    assert free is not None
    assert free.free


def test_a_choice_is_written_read_and_followed_or_refused() -> None:
    some = [matrix_of("fp32"), matrix_of("int8")]
    text = "fp32=vector/plain;int8=plain/plain"
    assert kernel_choice.to_text(kernel_choice.follow(text, some, LIMITS)) == text
    with pytest.raises(SpecError, match="names 'magic'"):
        kernel_choice.follow("fp32=magic/plain", some, LIMITS)
    with pytest.raises(SpecError, match="nothing of matrices in int8"):
        kernel_choice.follow("fp32=vector/plain", some, LIMITS)
    with pytest.raises(SpecError, match="int4pack was chosen for matrices in fp32"):
        kernel_choice.follow("fp32=int4pack/plain;int8=plain/plain", some, LIMITS)


def test_near_ties_go_to_the_first_kernel() -> None:
    times = [kernel_choice.KernelTiming("fp32", 1, {"packed": 1.0, "plain": 0.97, "vector": 1.2})]
    assert kernel_choice._best(["packed", "plain", "vector"], times) == "packed"
    times.append(kernel_choice.KernelTiming("fp32", 32, {"packed": 1.0, "plain": 0.8, "vector": 9.0}))
    assert kernel_choice._best(["packed", "plain", "vector"], times) == "plain"


def model_of(**changes: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SMALL, **changes}))
    for name, weight in model.named_parameters():
        if "norm" not in name and "embedding" not in name:
            weight.data *= 1.5
    return model


MIXTURE = {"moe": {"experts": 4, "chosen": 2, "shared_experts": 1}}
ENGINES = {
    "int8": ({}, Smaller("int8", QuantizationConfig())),
    "int4": (
        {"tie_embeddings": False},
        Smaller("int4", QuantizationConfig(keep=["blocks.1.attention.query"])),
    ),
    "mixture": (MIXTURE, None),
    "mixture in int4": (MIXTURE, Smaller("int4", QuantizationConfig(method="round"))),
}


@pytest.mark.parametrize("name", ENGINES)
def test_text_is_that_of_the_dequantised_model_whatever_else_runs(name: str) -> None:
    changes, smaller = ENGINES[name]
    model = model_of(**changes)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(97, (n,), generator=generator).tolist() for n in (5, 29, 1, 40, 16, 33)]
    params = [SamplingParams(max_tokens=12, seed=n) for n in range(6)]

    def engine(**options: object) -> Engine:
        return Engine(copy.deepcopy(model), None, smaller=smaller, **{"block_tokens": 8, **options})

    wanted = engine(max_running=32).generate(prompts, params)
    assert engine(max_running=1).generate(prompts, params) == wanted
    preempted = engine(cache_tokens=80, max_running=4)
    assert preempted.generate(prompts, params) == wanted
    assert preempted.stats().preemptions > 0
    whole = copy.deepcopy(model)
    if smaller is not None:
        smaller.apply(whole)
        whole = decompress_model(whole)
    for prompt, response in zip(prompts, wanted, strict=True):
        tokens = torch.tensor([[*prompt, *response.token_ids]])
        with torch.no_grad():
            logits = whole.eval()(tokens)[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("kernels", ["int4g32=int4pack/plain;int8=int8pack/plain", MEASURED])
def test_other_kernels_give_the_same_text_to_their_rounding(kernels: str) -> None:
    model, smaller = model_of(), Smaller("int4", QuantizationConfig(method="round"))
    prompts = [[5, 3, 8], [1] * 20]
    params = SamplingParams(max_tokens=1, temperature=0)
    plain = Engine(
        copy.deepcopy(model), None, smaller=smaller, kernels="int4g32=plain/plain;int8=plain/plain"
    )
    other = Engine(copy.deepcopy(model), None, smaller=smaller, kernels=kernels)
    if kernels == MEASURED:
        assert {timing.form for timing in other.timings} == {"int4g32", "int8"}
        again = Engine(copy.deepcopy(model), None, smaller=smaller, kernels=other.kernels)
        assert again.generate(prompts, params) == other.generate(prompts, params)
    for a, b in zip(plain.generate(prompts, params), other.generate(prompts, params), strict=True):
        assert abs(a.logprobs[0] - b.logprobs[0]) < 0.1


def test_published_weights_are_stored_smaller_again_and_none_stays_in_full_precision() -> None:
    smaller, prompts = Smaller("int8", QuantizationConfig()), [[5, 3, 8], [1] * 20]
    params = SamplingParams(max_tokens=8, temperature=0)
    first, second = model_of(), model_of()
    second.load_state_dict({n: w + 0.05 * torch.randn_like(w) for n, w in first.state_dict().items()})
    published = {n: w.clone() for n, w in second.state_dict().items()}
    engine = Engine(first, None, smaller=smaller)
    assert {n for n, w in first.state_dict().items() if not w.is_meta} == {
        n for n, _ in second.named_parameters() if "norm" in n or n == "embedding.weight"
    }
    engine.load_weights(published, 1)
    size = engine.stats().weight_bytes
    assert engine.generate(prompts, params) == [
        c.__class__(**{**c.__dict__, "weights_version": 1})
        for c in Engine(copy.deepcopy(second), None, smaller=smaller).generate(prompts, params)
    ]
    for weight in published.values():
        weight.zero_()
    assert engine.stats().weight_bytes == size
    assert engine.generate(prompts, params)[0].token_ids != (0,) * 8
    with pytest.raises(CheckpointError, match="unknown: more"):
        engine.load_weights({**second.state_dict(), "more": torch.zeros(1)}, 2)


def test_a_model_that_came_compressed_is_served_as_it_is() -> None:
    model = model_of()
    kinds = [*CHOICES.values(), MatrixChoice(rank=24)]
    compress_model(
        model, {n: kinds[at % len(kinds)] for at, n in enumerate(matrices(model)) if "down" not in n}
    )
    plain, prompt = decompress_model(model).eval(), [5, 3, 8, 2]
    state = {n: w.clone() for n, w in model.state_dict().items()}
    engine = Engine(model, None)
    for version in (0, 1):
        (found,) = engine.generate([prompt], SamplingParams(max_tokens=6, temperature=0))
        with torch.no_grad():
            logits = plain(torch.tensor([[*prompt, *found.token_ids]]))[0, 3:-1]
        expected = logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor(found.logprobs), expected, atol=5e-3, rtol=0)
        if not version:
            engine.load_weights(state, 1)
    assert any(isinstance(module, CompressedMatrix) for module in model.modules())


def test_full_precision_is_published_to_an_engine_whose_model_came_compressed() -> None:
    learner, smaller = model_of(), Smaller("int8", QuantizationConfig())
    published = {n: w.clone() for n, w in learner.state_dict().items()}
    compressed = model_of()
    compress_model(compressed, {n: MatrixChoice(bits=8, group=32) for n in matrices(compressed)})
    engine = Engine(compressed, None, smaller=smaller)
    with pytest.raises(SpecError, match="nothing of matrices in int8"):
        Engine(copy.deepcopy(learner), None, smaller=smaller, kernels=engine.kernels)
    engine.load_weights(published, 1)
    found = engine.generate([[5, 3, 8]], SamplingParams(max_tokens=5, temperature=0))[0]
    wanted = Engine(learner, None, smaller=smaller).generate(
        [[5, 3, 8]], SamplingParams(max_tokens=5, temperature=0)
    )[0]
    assert (found.token_ids, found.logprobs) == (wanted.token_ids, wanted.logprobs)
