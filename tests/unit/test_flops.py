"""Costs against the formulas of docs/theory D.2 and the papers; tests/numerics checks counts on built models."""

from __future__ import annotations

import subprocess
import sys

import pytest

from escala.schema import ModelConfig
from escala.schema.attention.exact import mean_keys
from escala.schema.flops import flops_per_token, parameter_counts
from workloads.training.meter import prefer_medium

GPT2_LIKE = ModelConfig(vocab_size=1000, n_layers=3, d_model=64, n_heads=4, d_ff=160, max_context_tokens=512)


def test_terms_follow_the_formulas() -> None:
    cost = flops_per_token(GPT2_LIKE, 512)
    assert cost.matmul == 6 * 3 * (4 * 64 * 64 + 3 * 64 * 160)
    assert cost.logits == 6 * 1000 * 64
    assert cost.attention == 6 * 3 * 4 * 16 * 512  # 6 L H d_h T: half of PaLM's 12 L H Q T, causal
    assert cost.total == cost.matmul + cost.logits + cost.attention


def test_total_is_six_n_chi_but_for_the_norms() -> None:
    counts, context = parameter_counts(GPT2_LIKE), 512
    chi = 1 + 3 * 4 * 16 * context / counts.n_total  # docs/theory D.2
    assert flops_per_token(GPT2_LIKE, context).total == pytest.approx(6 * counts.n_total * chi, rel=5e-3)


def test_untied_embeddings_cost_parameters_and_no_flops() -> None:
    untied = GPT2_LIKE.model_copy(update={"tie_embeddings": False})
    assert parameter_counts(untied).n_total == parameter_counts(GPT2_LIKE).n_total + 64_000
    assert parameter_counts(untied).n_non_embedding == parameter_counts(GPT2_LIKE).n_non_embedding
    assert flops_per_token(untied, 128) == flops_per_token(GPT2_LIKE, 128)


@pytest.mark.parametrize(("context", "window"), [(64, None), (64, 64), (64, 200), (64, 7), (1000, 32)])
def test_mean_keys_is_half_a_key_under_the_exact_count(context: int, window: int | None) -> None:
    exact = sum(min(i + 1, window or context) for i in range(context)) / context
    assert exact - mean_keys(context, window) == pytest.approx(min(window or context, context) / context / 2)


def test_a_window_saturates() -> None:
    windowed = GPT2_LIKE.model_copy(update={"window_tokens": 16})
    near, far = (flops_per_token(windowed, t).attention for t in (10_000, 10_000_000))
    assert near == pytest.approx(far, rel=1e-3)
    assert far == pytest.approx(12 * 3 * 4 * 16 * 16, rel=1e-3)


EXPERTS = {"experts": 8, "chosen": 2, "d_ff": 48, "shared_experts": 1, "every": 2}


def test_a_mixture_s_counts_and_flops_follow_the_formulas() -> None:
    mixed = ModelConfig(**{**GPT2_LIKE.model_dump(), "n_layers": 4, "moe": EXPERTS})
    dense = ModelConfig(**{**GPT2_LIKE.model_dump(), "n_layers": 4})
    change = (
        2 * 64 * 8 + 2 * 3 * 64 * 48 * 9 - 2 * 3 * 64 * 160
    )  # two layers: routers, 8 + 1 experts, no d_ff
    assert parameter_counts(mixed).n_total == parameter_counts(dense).n_total + change
    idle = 2 * 3 * 64 * 48 * 6
    assert parameter_counts(mixed).n_active == parameter_counts(mixed).n_total - idle
    more = flops_per_token(mixed, 512).matmul - flops_per_token(dense, 512).matmul
    assert more == 6 * (change - idle)
    assert flops_per_token(mixed, 512).attention == flops_per_token(dense, 512).attention


def test_flops_of_a_mixture_are_of_the_slots_that_it_has() -> None:
    def matmul(**moe: object) -> float:
        model = ModelConfig(**{**GPT2_LIKE.model_dump(), "moe": {"experts": 8, "d_ff": 48, **moe}})
        return flops_per_token(model, 512).matmul

    one = 6 * 3 * 3 * 64 * 48  # an expert in each of three layers
    assert matmul() == matmul(capacity_factor=None) == matmul(capacity_factor=1.0)
    assert matmul() - matmul(capacity_factor=0.75) == pytest.approx(2 * one * 0.25)
    assert matmul(estimator="soft_to_hard") - matmul() == 6 * one  # a dense mixture computes all


def test_neither_config_nor_flops_imports_torch() -> None:
    code = "import sys, escala.schema.flops; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("error", "speed", "chosen"),
    [(1.9, 2.0, True), (2.1, 2.0, False), (1.0, 0.84, False), (1.0, 1.1, False)],
)
def test_medium_precision_must_be_as_exact_and_far_faster(error: float, speed: float, chosen: bool) -> None:
    errors = {"highest": 3e-6, "medium": error * 3e-6}
    assert prefer_medium(errors, {"highest": 1e11, "medium": speed * 1e11}) is chosen
