"""From (C, N, D, T) to a configuration: exact compute, near shapes, a rule that recovers the truth of its table."""

from __future__ import annotations

import csv
import math
import random
from collections import defaultdict

import numpy as np
import pytest

from escala import spec
from escala.contract.errors import SpecError
from escala.schema import ModelConfig
from escala.schema.flops import parameter_counts
from tune_spaces import recipes

TUNED = {"batch_sequences": 8, "optimizer": {"learning_rate": 1e-3}}
BASE = {"model": {"vocab_size": 1024, "max_context_tokens": 64}, "training": TUNED}
DATA = {"tokenizer": {"vocab_size": 1024}}


def resolved(**axes: float) -> spec.Resolved:
    base = spec.merge(recipes.sections(BASE, **axes), {**BASE, "data": DATA})
    return spec.resolve(spec.load_job("pretrain", base=base))


@pytest.mark.parametrize(
    "axes",
    [
        {"compute_flops": 3e12},
        {"compute_flops": 3e12, "tokens_per_parameter": 5},
        {"compute_flops": 3e12, "n_total": 2e5},
        {"compute_flops": 3e12, "tokens": 1e6},
        {"compute_flops": 3e12, "n_total": 2e5, "context_tokens": 32},
    ],
)
def test_compute_is_exact(axes):
    found = resolved(**axes)
    step = found.flops_per_token * found.spec.config.step_tokens
    assert 0 <= found.compute_flops - 3e12 <= step
    if "n_total" in axes:
        assert found.n_total == pytest.approx(2e5, rel=0.16)
    if "tokens" in axes:
        assert found.train_tokens == pytest.approx(1e6, rel=0.2)
    if not {"n_total", "tokens"} & set(axes):
        ratio = axes.get("tokens_per_parameter", 20)
        assert found.train_tokens / found.n_total == pytest.approx(ratio, rel=0.35)


def test_size_and_length_may_be_said_directly():
    found = resolved(n_total=1e5, tokens=2e5)
    assert found.n_total == pytest.approx(1e5, rel=0.16)
    assert 0 <= found.train_tokens - 2e5 < 8 * 64
    assert resolved(n_total=1e5, tokens_per_parameter=3).train_tokens == pytest.approx(
        3 * found.n_total, rel=0.01
    )
    assert recipes.sections(BASE, n_total=1e5).get("training") == {"context_tokens": 64}
    assert "d_model" not in recipes.sections(BASE, tokens=1e5)["model"]
    assert recipes.sections(BASE, context_tokens=128)["model"] == {"max_context_tokens": 128}


@pytest.mark.parametrize("n", [3e4, 1e5, 7e5, 3e6, 4e7, 1e9, 7e10])
def test_a_shape_has_nearly_the_parameters_asked_for(n):
    model = {"vocab_size": 1024 if n < 1e7 else 50_000}
    found = recipes.shape(n, model)
    assert parameter_counts(ModelConfig(**model, **found)).n_total == pytest.approx(n, rel=0.16)
    if n >= 3e6:
        assert 16 <= found["d_model"] / found["n_layers"] <= 256


@pytest.mark.parametrize("every", [1, 3])
def test_a_mixture_is_sized_by_what_is_active(every):
    """The experts are the base's; at one n_active more of them make a larger n_total of the same shape."""
    shapes = []
    for experts in (4, 16):
        model = {**BASE["model"], "moe": {"experts": experts, "chosen": 1, "every": every}}
        found = recipes.sections({**BASE, "model": model}, n_active=2e5, tokens_per_parameter=10)
        config = ModelConfig(**{**model, **found["model"]})
        counts = parameter_counts(config)
        assert counts.n_active == pytest.approx(2e5, rel=0.16)
        assert config.n_layers % every == 0
        assert found["training"]["train_tokens"] == 10 * counts.n_active
        shapes.append((found["model"], counts.n_total))
    assert shapes[0][0] == shapes[1][0]
    assert shapes[1][1] > 2 * shapes[0][1]
    total = recipes.shape(1e6, {**BASE["model"], "moe": {"chosen": 1}}, "n_total")
    config = ModelConfig(**BASE["model"], moe={"chosen": 1}, **total)
    assert parameter_counts(config).n_total == pytest.approx(1e6, rel=0.16)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"compute_flops": 1e12, "n_total": 1e5, "tokens": 1e5}, "more than once"),
        ({"n_active": 1e5, "n_total": 1e5}, "more than once"),
        ({"tokens_per_parameter": 20}, "neither N nor D"),
        ({"n_total": 5e3}, "no model of 5000 parameters"),
        ({"n_total": -1}, "n_total is -1"),
    ],
)
def test_what_is_impossible_says_why(axes, said):
    with pytest.raises(SpecError, match=said):
        recipes.sections(BASE, **axes)


def test_two_sources_of_a_shape_are_refused():
    with pytest.raises(SpecError, match=r"so does model.n_layers"):
        recipes.sections({"model": {"n_layers": 2}}, n_total=1e5)


# The rule


def table(noise: float = 0.003) -> list[dict[str, float]]:
    """A search whose truth is lr* = 0.4 N^-0.6 D^0.3 (B/B*)^0.5 and B* = 2 D^0.5."""
    rng, rows = random.Random(0), []
    for n, d in ((4e4, 1e5), (4e4, 1e6), (2e5, 4e5), (1e6, 4e5), (1e6, 4e6)):
        best_batch = 2 * d**0.5
        for batch in (256, 1024, 4096):
            off = math.log(batch / best_batch)
            best = 0.4 * n**-0.6 * d**0.3 * math.exp(0.5 * off)
            for rate in (1e-3, 3e-3, 9e-3, 2.7e-2):
                bowl = 0.01 * math.log(rate / best) ** 2 + 0.01 * off**2
                loss = 4 * (1 + bowl) * math.exp(noise * rng.gauss(0, 1))
                rows.append(
                    {
                        "n_total": n,
                        "tokens": d,
                        "batch_tokens": batch,
                        "learning_rate": rate,
                        "loss_nats": loss,
                    }
                )
    return rows


def test_the_rule_recovers_what_made_its_table():
    rule = recipes.fit_rule(table(noise=0.0))
    for n, d in ((4e4, 1e6), (1e6, 1e6)):
        assert rule.batch_tokens(d) == pytest.approx(2 * d**0.5, rel=0.35)
        assert rule.learning_rate(n, d, 2 * d**0.5) == pytest.approx(0.4 * n**-0.6 * d**0.3, rel=0.35)
    assert rule.r == pytest.approx(0.5, abs=0.05)
    noisy = recipes.fit_rule(table())
    assert noisy.learning_rate(4e5, 1e6, 1024) == pytest.approx(rule.learning_rate(4e5, 1e6, 1024), rel=0.5)


def test_a_table_without_a_bowl_is_said():
    rows = [r for r in table() if r["learning_rate"] <= 3e-3 or r["batch_tokens"] == 256]
    assert any("edge" in note for note in recipes.fit_rule(rows).notes)
    with pytest.raises(SpecError, match="six runs"):
        recipes.fit_rule(table()[:5])


def test_the_kept_table_gives_a_sane_rule():
    rule = recipes.rule()
    assert 1e-4 < rule.learning_rate(2e5, 1e6, rule.batch_tokens(1e6)) < 0.1
    assert rule.learning_rate(1e9, 2e10, rule.batch_tokens(2e10)) < rule.learning_rate(2e5, 1e6, 1024)
    made = recipes.sections({"model": BASE["model"], "resources": {"workers": 2}}, n_total=2e5, tokens=1e6)
    sequences = made["training"]["batch_sequences"]
    assert sequences % 2 == 0
    assert 1e6 / (sequences * 64) >= recipes.MIN_STEPS / 2
    assert "batch_sequences" not in recipes.sections(BASE, n_total=2e5, tokens=1e6)["training"]


def bottom(runs: list[dict[str, str]]) -> tuple[float, np.polynomial.Polynomial]:
    """The best rate's logarithm, and the loss by it, of runs that differ in learning rate alone: a parabola through the
    best of them and its neighbours.
    """
    points = sorted((math.log(float(r["learning_rate"])), float(r["loss_nats"])) for r in runs)
    lowest = min(range(len(points)), key=lambda i: points[i][1])
    near = np.array(points[lowest - 1 : lowest + 2])
    assert len(near) == 3, "the best rate lies at the edge of the search"
    curve = np.polynomial.Polynomial.fit(near[:, 0], near[:, 1], 2)
    return float(curve.deriv().roots()[0]), curve


def test_what_the_rule_leaves_on_the_table_of_the_wider_search():
    """Under half a percent under cosine and wsd, at up to the 150 tokens per parameter that `chinchilla` goes to."""
    cells: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    with recipes.TABLE.with_name("learning_rate_wide.csv").open() as file:
        for row in csv.DictReader(file):
            cells[row["n_total"], row["tokens"]][row["schedule"]].append(row)
    assert len(cells) == 5
    ratios = []
    for (n_total, tokens), schedules in cells.items():
        best = {}
        for schedule, runs in schedules.items():
            assert len(runs) == 5
            best[schedule], curve = bottom(runs)
            base = {
                "training": {
                    "batch_sequences": int(runs[0]["batch_tokens"]) // 64,
                    "optimizer": {"schedule": schedule},
                }
            }
            rate = recipes._tuning(base, int(n_total), float(tokens), 64)["optimizer"]["learning_rate"]
            left = float(curve(math.log(rate)) / curve(best[schedule]) - 1)
            assert left < (0.005 if float(tokens) <= 150 * float(n_total) else 0.01)
        ratios.append(best["wsd"] - best["cosine"])
    assert math.exp(np.mean(ratios)) == pytest.approx(recipes.STEADY_RATE, abs=0.01)
