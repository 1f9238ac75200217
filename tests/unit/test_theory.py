"""docs/theory: every citation finds its heading, every file that a page names is there, and every worked number on the
pages is what the code computes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from escala.hardware import load_cluster
from escala.laws import Law, Objective, fit_law
from escala.laws.drift import wilson
from escala.laws.forms import FORMS
from escala.laws.intervals import inflation, quantile_pair
from escala.laws.optimum import TwoTerms, best_split
from escala.planning.allocate import allocate, to_target
from escala.planning.cost import communication, kv_cache_bytes_per_token, memory_bytes
from escala.planning.curve import Curve
from escala.planning.limits import Chi, Limits
from escala.planning.plan import Plan
from escala.planning.plans import cluster_speed
from escala.planning.propose import WINSOR_VARIANCE, information, noise_variance, observe
from escala.planning.split import effective_tokens
from escala.planning.workers import workers_curve
from escala.rollouts.governor import spectral_radius
from escala.rollouts.stability import BRISK, QUICKEST
from escala.schema import ModelConfig, PretrainConfig, RecallCorpus
from escala.schema.flops import flops_per_token, parameter_counts
from escala.schema.moe import Annealing
from workloads.alignment.advantages import gae, grpo, rloo
from workloads.alignment.kl import ProportionalKL, kl
from workloads.alignment.losses import bradley_terry, dpo_loss, policy_loss, value_loss
from workloads.alignment.token_rewards import token_rewards
from workloads.data.recall import ideal_loss, key_entropy
from workloads.model import balance, gate, sequence_capacity
from workloads.model.compression.spectrum import active_entropy
from workloads.model.rope import RotaryTable, rotate
from workloads.rewards.judge_models import compare
from workloads.training.evaluate import bits_per_byte
from workloads.training.experts import temperature

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "theory"
CITING = ("platform", "workloads", "tune_spaces", "tests", "benchmarks", "clusters", "docs")
SUFFIXES = {".py", ".md", ".yaml", ".toml", ".csv", ".ipynb"}
LABEL = r"[A-E](?:\.\d+)?"
ONES = torch.ones(1, 1)

# Hoffmann et al. (2022) as printed; Besiroglu et al. (2024).
PRINTED = TwoTerms(1.69, 406.4, 0.34, 410.7, 0.28)
CORRECTED = TwoTerms(1.8172, 482.01, 0.3478, 2085.43, 0.3658)
GPT2 = {"n_layers": 12, "d_model": 768, "n_heads": 12}


@cache
def page(name: str) -> str:
    """A page with its lines joined, and Unicode's minus as a hyphen."""
    return " ".join((PAGES / name).read_text(encoding="utf-8").replace("\u2212", "-").split())


def says(name: str, *parts: str) -> None:
    """Each part stands on the page."""
    for part in parts:
        assert part in page(name), f"docs/theory/{name} does not say: {part}"


def labels() -> list[str]:
    """Of all headings."""
    found = []
    for path in PAGES.glob("*.md"):
        found += re.findall(rf"^#{{1,2}} ({LABEL})\.? ", path.read_text(encoding="utf-8"), re.M)
    return found


def cited(text: str) -> Iterator[str]:
    """The labels that a text cites; of a range all of them."""
    one = rf"({LABEL})"
    for found in re.finditer(rf"docs/theory {one}((?:(?:, | and | to |-){one})*)", text):
        words = re.findall(rf"{LABEL}| to |-|, | and ", found[1] + found[2])
        yield from words[::2]
        for at in range(1, len(words), 2):
            if words[at] in (" to ", "-"):
                (letter, first), (_, last) = (words[i].split(".") for i in (at - 1, at + 1))
                yield from (f"{letter}.{n}" for n in range(int(first) + 1, int(last)))


def sources() -> Iterator[tuple[str, str]]:
    """(path, text) of all that may cite."""
    paths = [ROOT / "Makefile", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for room in CITING:
        paths += [p for p in sorted((ROOT / room).rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
    for path in paths:
        if path != Path(__file__):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_every_citation_has_its_heading() -> None:
    there = Counter(labels())
    assert max(there.values()) == 1, there
    assert len(there) > 30
    found = [(path, label) for path, text in sources() for label in cited(text)]
    assert len(found) > 80
    assert not [each for each in found if each[1] not in there]
    assert not [path for path, text in sources() if "SPEC" + ".md" in text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(docs/theory B; x)", ["B"]),
        ("docs/theory C.2, C.4.", ["C.2", "C.4"]),
        ("docs/theory D.2-D.4", ["D.2", "D.4", "D.3"]),
        ("docs/theory B.1 to B.3, B.5", ["B.1", "B.3", "B.5", "B.2"]),
        ("docs/theory, D.2", []),
    ],
)
def test_a_citation_is_read(text: str, expected: list[str]) -> None:
    assert list(cited(text)) == expected


def test_labels_of_a_page_rise_and_the_index_names_them() -> None:
    for path in PAGES.glob("[!i]*.md"):
        text = path.read_text(encoding="utf-8")
        letter = re.findall(r"^# ([A-E])\. ", text, re.M)
        numbers = [int(n) for n in re.findall(rf"^## {letter[0]}\.(\d+) ", text, re.M)]
        assert numbers, path
        assert all(a < b for a, b in pairwise(numbers)), path
        says("index.md", f"{letter[0]}.{numbers[0]}", f"{letter[0]}.{numbers[-1]}", f"({path.name})")


def test_every_file_that_a_page_names_is_there() -> None:
    found = []
    for path in PAGES.glob("*.md"):
        found += re.findall(r"`((?:\w+/)+[\w.]+)`", path.read_text(encoding="utf-8"))
    assert len(found) > 40
    assert not [name for name in found if not (ROOT / name).exists()]


def test_units_and_attention() -> None:
    says("index.md", f"at 4.2 bytes per token is {bits_per_byte(3.0, 4.2):.3f} bits per byte")
    cos, sin = RotaryTable(4, 10_000.0)(10, like=ONES)
    turned = rotate(torch.tensor([1.0, 0, 0, 0]).expand(10, 1, 4), cos, sin)[:, 0]
    assert float(turned[3] @ turned[1]) == pytest.approx(float(turned[9] @ turned[7]), abs=1e-6)
    says("attention.md", f"cos 2 = {float(turned[3] @ turned[1]):.4f}")
    model = ModelConfig(**GPT2)
    says("attention.md", f"that is {kv_cache_bytes_per_token(model, 2):,.0f} bytes per token")
    plain = ModelConfig(**GPT2, max_context_tokens=8192)
    window = plain.model_copy(update={"window_tokens": 1024})
    narrow, wide = (m.attention.flops(m, 8192) for m in (window, plain))
    said = f"W = 1,024 cost {narrow:.2e} FLOPs a token forward at T = 8,192, and without a window {wide:.2e}"
    says("attention.md", said.replace("e+0", "e").replace("e+", "e"))


def test_the_corpus_with_a_known_term_of_t() -> None:
    corpus, contexts = RecallCorpus(kind="recall"), [32, 64, 128, 256, 512]
    points = pd.DataFrame(
        {"context_tokens": contexts, "loss_nats": [ideal_loss(corpus, t) for t in contexts]}
    )
    fitted = fit_law(points, "t", bootstrap=0).parameters
    floor = key_entropy(corpus) / 2
    said = f"has ζ = {fitted['zeta']:.3f}, not 1/3, and L_inf = {fitted['L_inf']:.2f}, not {floor:.3f}."
    says("attention.md", said, f"s = {corpus.exponent}, K = {corpus.keys:,}, V = {corpus.values}")


def test_experts() -> None:
    two, one = (gate.top_k(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), k).weights_NK[0].tolist() for k in (2, 1))
    says("experts.md", f"weights {two[0]:.3f} and {two[1]:.3f}. k = 1: weight {one[0]:.3f}")
    says("experts.md", f"it is {temperature(40, 101, Annealing()):.3f} at 40 % of a run")
    says("experts.md", f"a factor of 1.25 these are {gate.capacity(1.25, 1024, 2, 8)}")
    bound_BT = sequence_capacity.bounds(torch.arange(1024)[None], 1.25, 2, 8)
    experts_BTK = torch.tensor([5, 2]).expand(1, 1024, 2)
    kept_BTK, taken_BE = sequence_capacity.keep(experts_BTK, bound_BT, torch.zeros(1, 8, dtype=torch.long))
    first, kept = bound_BT[0, :8].tolist(), kept_BTK[0, :8, 0].nonzero().flatten().tolist()
    says("experts.md", f"the first eight positions are {', '.join(map(str, first))}: an expert that")
    said = f"computes those at positions {', '.join(map(str, kept))}"
    says("experts.md", f"{said}. Of 1,024 such tokens it computes {taken_BE[0, 5]}.")
    logits_NE = torch.zeros(100, 8, dtype=torch.float64)
    logits_NE[:, 0] += 0.01
    chosen = gate.dispatch(gate.top_k(logits_NE, 1).experts_NK, 1, 8, None)
    even = balance.symmetric_kl(balance.log_mean_probability(logits_NE.log_softmax(-1)))
    ratio = float(balance.load_ratio(chosen.load_E.double()))
    says("experts.md", f"V = {float(even):.1e}".replace("e-05", "e-5"), f"a load ratio of {ratio:g}")


def test_rewards_and_advantages() -> None:
    old, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    rewards = token_rewards(torch.ones(1), old, reference, torch.ones(1, 2), 0.1)[0].tolist()
    says("alignment.md", f"rewards ({rewards[0]:.3g}, {rewards[1]:.3g})")
    given = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.5, 0.6]]), torch.ones(1, 3)
    advantages, returns = (x[0].tolist() for x in gae(*given, 1.0, 0.95))
    said = f"advantages ({_row(advantages)}), returns ({_row(returns)})"
    cut = gae(*given, 1.0, 0.95, torch.tensor([0.5]))[0][0].tolist()
    says("alignment.md", said, f"after the end: advantages ({_row(cut)})")
    group = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long)
    by_std, plain, others = grpo(*group), grpo(*group, by_std=False), rloo(*group)
    says(
        "alignment.md",
        f"grpo ({by_std[0]:.4f}, {by_std[1]:.4f}, …), dr_grpo ({plain[0]:g}, {plain[1]:g}, …), "
        f"rloo ({others[0]:g}, {others[1]:.3f}, …)",
    )


def _row(values: list[float]) -> str:
    return ", ".join(f"{value:.5g}" for value in values)


def test_losses_of_alignment() -> None:
    for ratio, advantage in ((1.5, 1.0), (1.5, -1.0), (0.5, 1.0), (0.5, -1.0)):
        logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss = policy_loss(logp, torch.zeros(1, 1), advantage * ONES, ONES, 0.2, 0.2)
        loss.backward()  # type: ignore[no-untyped-call]
        assert logp.grad is not None
        says("alignment.md", f"| {ratio} | {advantage:g} | {float(loss):.2g} | {float(logp.grad):g} |")
    values = ONES, 0.5 * ONES, 2 * ONES, ONES
    plain, clipped = float(value_loss(*values)), float(value_loss(*values, clip=0.2))
    says("alignment.md", f"R = 2: {plain:g} without, {clipped:.3g} with c = 0.2")
    for d in (0.1, 1.0, -1.0):
        k1, k2, k3 = (float(kl(torch.tensor([d]), torch.zeros(1), kind)) for kind in ("k1", "k2", "k3"))
        says("alignment.md", f"| {d:g} | {k1:.3g} | {k2:.3g} | {k3:.3g} |")
    says("alignment.md", f"horizon 10,000: {ProportionalKL(0.05, 6.0, 10_000).update(9.0, 256):.6f}")
    even, ahead = (float(bradley_terry(torch.tensor([x]), torch.zeros(1))) for x in (0.0, 1.0))
    says("alignment.md", f"cost ln 2 = {even:.3f}, a difference of 1 costs {ahead:.3f}")
    loss = dpo_loss(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), 0.1)
    says("alignment.md", f"reference -11 and -11: {float(loss):.3f}")
    (verdict,) = compare(lambda _: [0.9, 0.4], [("p", "a", "b")])
    says("alignment.md", f"q = 0.4: win {verdict.win:g}, place bias {verdict.place_bias:.2f}")


def test_flops() -> None:
    model = ModelConfig(**GPT2, vocab_size=50_257, max_context_tokens=32_768)
    n = parameter_counts(model).n_total
    chi = [1 + flops_per_token(model, t).attention / 6 / n for t in (1024, 8192, 32_768)]
    says(
        "laws.md",
        f"N = {_short(n, 4)}): T_0 = {n / (12 * 768):,.0f}; χ = {chi[0]:.3f} at T = 1,024, "
        f"{chi[1]:.3f} at 8,192, {chi[2]:.3f} at 32,768",
    )


def _short(value: float, digits: int) -> str:
    """As 2.778e9."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def law(replicates: int = 0) -> Law:
    """The law of Besiroglu et al. (2024)."""
    unused = {"objective_value": 0.0, "findings": (), "settings": {}, "table": {}, "refused_table": {}}
    names = ("L_inf", "a", "alpha", "b", "beta")
    parameters = {name: getattr(CORRECTED, name if name != "L_inf" else "constant") for name in names}
    theta_P = np.array([parameters[name] for name in FORMS["nd"].names])
    return Law(
        form_name="nd",
        size="n_active",
        objective=Objective(),
        parameters=parameters,
        healthy=True,
        ranges={"n_active": (1e7, 1e9), "tokens": (1e8, 1e11)},
        replicates_BP=np.tile(theta_P, (replicates, 1)),
        residual_draws_B=np.zeros(replicates),
        residual_N=np.zeros(1),
        **unused,
    )


def test_optima() -> None:
    for two, years in ((PRINTED, "as printed"), (CORRECTED, "arXiv:2404.10102")):
        best = best_split(two, 1e21, 6.0, 1.0)
        numbers = ", ".join(f"{value:g}" for value in list(vars(two).values())[:5])
        row = f"| {_short(best.size, 4)} | {_short(best.tokens, 4)} | {best.tokens / best.size:.1f} | "
        says("laws.md", f"{years} ({numbers}) {row}{best.loss_nats:.4f} |")
    for t in (2048, 8192, 32_768):
        plan = allocate(law(), Limits(compute_flops=1e21), chi=Chi(0.05, 1 / 3), context_tokens=t)
        found = (
            f"{_short(plan.n_active, 4)} | {_short(plan.tokens, 4)} | {plan.chi:.3f} | {plan.loss_nats:.4f}"
        )
        says("laws.md", f"| {t:,} | {found} |")
    ranges = {**law().ranges, "context_tokens": (128.0, 32_768.0)}
    theta = {**law().parameters, "c": 5.0, "zeta": 0.5}
    with_t = replace(law(), form_name="ndt", parameters=theta, ranges=ranges, replicates_BP=np.empty((0, 7)))
    knots = np.geomspace(128, 32_768, 65)
    window = Curve.through(knots.tolist(), np.where(knots < 1024, knots, 2048 - 1024**2 / knots).tolist())
    for name, growth in (("exact", None), ("window", window)):
        plan = allocate(with_t, Limits(compute_flops=1e21), chi=Chi(0.05, 1 / 3, growth))
        row = [f"{plan.context_tokens:,.0f}", _short(plan.n_active, 4), _short(plan.tokens, 4)]
        row += [f"{plan.chi:.3f}", f"{plan.loss_nats:.4f}", ", ".join(f"`{each}`" for each in plan.binding)]
        says("laws.md", f"| {name} | {' | '.join(row)} |")


def test_repeats_demand_and_the_energy_of_a_target() -> None:
    four, ten = (float(effective_tokens(np.array([e * 1e9]), 1e9)[0]) / 1e9 for e in (4, 10))
    says("laws.md", f"Four epochs count as {four:.2f}, ten as {ten:.2f}")
    fresh, few = (allocate(law(), Limits(compute_flops=1e21, data_tokens=tokens)) for tokens in (None, 1e10))
    says(
        "laws.md",
        f"takes N = {_short(few.n_active, 4)} and {few.epochs:.2f} epochs, which count as "
        f"{_short(few.effective_tokens, 4)} tokens, and loses {few.loss_nats - fresh.loss_nats:.4f} nats",
    )
    plain, served, lower = (
        to_target(law(), loss, Limits(inference_tokens=demand)).plan
        for loss, demand in ((2.3055, None), (2.3055, 1e12), (2.2055, None))
    )
    says(
        "laws.md",
        f"without demand N = {_short(plain.n_active, 4)}; with 1e12 tokens to serve N = "
        f"{_short(served.n_active, 4)} on {_short(served.tokens, 4)} tokens, "
        f"{served.tokens_per_parameter:.0f} per parameter",
    )
    _energy_of_a_target(plain, lower)


def _energy_of_a_target(plain: Plan, lower: Plan) -> None:
    speed, _ = cluster_speed(load_cluster("h100-8"), "bf16")
    spent = speed.spending(1e21)
    says("energy.md", f"need {_short(plain.compute_flops, 4)} FLOPs")
    says("energy.md", f"{spent['hours']:.1f} hours and {spent['kwh']:.0f} kWh")
    says("energy.md", f"nats take {lower.compute_flops / plain.compute_flops:.2f} times as much")


def test_memory_and_traffic() -> None:
    device, states, sent = load_cluster("h100-8").device, [], []
    for stage in range(4):
        training = {"zero_stage": stage, "precision": "bf16", "batch_sequences": 256, "context_tokens": 1024}
        config = PretrainConfig.model_validate(
            {
                "model": {**GPT2, "vocab_size": 50_304, "max_context_tokens": 1024},
                "data": {"tokenizer": {"vocab_size": 4096}},
                "training": {**training, "micro_batch_sequences": 8},
                "resources": {"workers": 8},
            }
        )
        memory, n = memory_bytes(config, device), parameter_counts(config.model).n_total
        states.append((memory.weights + memory.gradients + memory.optimizer) / n)
        sent.append(communication(config).sent_bytes / n)
    says("laws.md", f"{states[0]:g} bytes at stage 0, and on 8 ranks {_listed(states[1:])}.")
    says("laws.md", f"m = 4 in bf16 that is {_listed(sent)} bytes per parameter")


def test_workers() -> None:
    """The closed form is test_workers.py's."""
    model = {**GPT2, "vocab_size": 50_304, "max_context_tokens": 1024}
    training = {"zero_stage": 1, "precision": "bf16", "batch_sequences": 512, "context_tokens": 1024}
    shown, hidden = (
        workers_curve(
            PretrainConfig.model_validate(
                {
                    "model": model,
                    "data": {"tokenizer": {"vocab_size": 4096}},
                    "training": training,
                    "resources": {"gpus_per_worker": gpus},
                }
            ),
            load_cluster("h100-8"),
            1024,
        )
        for gpus in (0, 1)
    )
    for row in shown.rows[-4:]:
        times = (row.compute_seconds, row.exposed_seconds, row.step_seconds)
        cells = [str(row.workers), *(f"{1e3 * seconds:.2f}" for seconds in times)]
        says("laws.md", f"| {' | '.join(cells)} | {row.workers * times[2] ** 2:.5f} | {row.gain:.2f} |")
    best, fewest = shown.best, next(row.workers for row in shown.rows if row.fits)
    assert best is not None
    assert hidden.best is not None
    says(
        "laws.md",
        f"P* = {best.workers}, by a margin of {best.margin_more:.1%} over 512".replace("%", " %"),
        f"and {best.margin_fewer:.1%} over 128".replace("%", " %"),
        f"T is {best.over_fastest:.2f} times that of {best.fastest}. It does not fit below P = {fewest}",
    )
    step = {row.workers: row.step_seconds for row in hidden.rows}[hidden.best.workers]
    says("laws.md", f"hidden P* is {hidden.best.workers} as well, and T {1e3 * step:.2f} ms")


def _listed(values: list[float]) -> str:
    *first, last = (f"{value:g}" for value in values)
    return f"{', '.join(first)} and {last}"


def test_intervals_and_information() -> None:
    says("laws.md", f"n = 20, p = 5 the inflation is {inflation(20, 5):.3f}")
    shares = []
    for count in (20, 40, 1000):
        low, high = quantile_pair((np.arange(count) + 1.0) / (count + 1), 0.9)  # a draw's expected ranks
        shares.append(f"{high - low:.1%}".replace("%", " %"))
    says("laws.md", f"of 90 %, {shares[0]} with 20, {shares[1]} with 40, {shares[2]} with 1,000")
    low, high = wilson(18, 20)
    says("laws.md", f"a true coverage of {low:.3f} to {high:.3f}")
    covariance = np.array([[1.0, 0.8], [0.8, 1.0]])
    left, told = observe(covariance, 0, 0.25)[0, 0], information(covariance, 0.25)[0]
    says("laws.md", f"Var(m | y) = {left:.3f}, {told:.3f} nats", f"by 1/{WINSOR_VARIANCE}")
    draws_B = 0.01 * norm.ppf((np.arange(100_001) + 0.5) / 100_001)  # a normal's, without chance
    factors = []
    for delta in (1e-6, 1e-2):
        some = SimpleNamespace(residual_draws_B=draws_B, objective=Objective("log", delta))
        factors.append(noise_variance(some) / 1e-4)  # type: ignore[arg-type]
    says("laws.md", f"π/2 = {factors[0]:.3f} in the limit of a median, {factors[1]:.3f} at δ = σ")


def test_energy() -> None:
    device = load_cluster("h100-8").device
    flops = 0.4 * device.peak_flops_per_second["bf16"].value
    moved = device.memory_bytes_per_second.value / 2
    rates = load_cluster("h100-8").rates()
    bare = replace(rates, site_factor=1.0)
    parts = [bare.joules(1, *only) for only in ((1.0, 0.0, 0.0), (0.0, flops, 0.0), (0.0, 0.0, moved))]
    static, arithmetic, traffic = (part or 0.0 for part in parts)
    total = rates.joules(1, 3600.0, 3600 * flops, 3600 * moved) or 0.0
    says(
        "energy.md",
        f"static {static:g} W, arithmetic {arithmetic:.1f} W, traffic {traffic:.1f} W; together "
        f"{sum((static, arithmetic, traffic)):.1f} W, and at the meter of a site with a factor of "
        f"{rates.site_factor:g} {total / 3600:.1f} W, or {_short(total, 4)} J",
    )


def test_entropy() -> None:
    density, step = 0.5 * math.log2(2 * math.pi * math.e), math.log2(4.5 / 127)
    says(
        "energy.md",
        f"has {density - step:.2f} bits, since ½ log2(2πe) = {density:.3f} and log2(4.5/127) = {step:.3f}",
    )
    met = active_entropy(torch.tensor([3, 1]), torch.tensor([4.0, 8.0]))
    says("energy.md", f"two experts of 4 and 8 bits, met in proportion 3 to 1, have {met:g} bits")


def test_governor() -> None:
    radii = [f"{spectral_radius(2, 0.5, 1, 2, delay):.3f}" for delay in (0, 1, 2)]
    says(
        "energy.md",
        f"a spectral radius of {radii[0]}, {radii[1]} and {radii[2]} at a delay of 0, 1 and 2 windows",
        f"{BRISK:g} times that is used, {QUICKEST:g} at the most",
    )
