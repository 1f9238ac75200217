"""The mixture of experts against a loop over tokens and experts, finite differences, and its own promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from escala.contract.errors import CheckpointError
from escala.schema import Annealing, BalanceConfig, ModelConfig, PretrainConfig
from escala.schema.flops import parameter_counts, saved_elements_per_token
from escala.schema.moe import ExpertKernel
from workloads.model import balance, gate
from workloads.model.expert_kernels import KERNELS, measure
from workloads.model.expert_runs import Run, runs_of
from workloads.model.experts import Experts
from workloads.model.gate import dispatch
from workloads.model.moe import MixtureOfExperts, mixtures
from workloads.model.sequence_capacity import bounds, keep, keep_next
from workloads.model.transformer import Transformer
from workloads.training.experts import COLLAPSE_TAG, Routers, temperature
from workloads.training.kernels import choose_kernels, follow_kernels

BATCH, CONTEXT, WIDTH = 2, 5, 4


def layer(double: bool = True, **moe: Any) -> MixtureOfExperts:
    config = ModelConfig(d_model=WIDTH, n_heads=1, d_ff=3, moe={"experts": 4, "chosen": 2, **moe})
    torch.manual_seed(0)
    assert config.moe is not None
    made = MixtureOfExperts(config, config.moe, 1.0)
    with torch.no_grad():
        made.router.weight.mul_(3)  # a gate that is not almost even
    return made.double() if double else made


def states(rows: int = BATCH, context: int = CONTEXT) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, context, WIDTH, dtype=torch.float64)


def by_loops(made: MixtureOfExperts, x_BTD: Tensor, limit: int | None) -> tuple[Tensor, int]:
    """docs/theory B.1 and B.5 read out loud: for each position, choice rank and row, take a slot if there is one."""
    moe, experts = made.moe, made.experts
    out_BTD, used, dropped = torch.zeros_like(x_BTD), [0] * moe.experts, 0
    for t in range(x_BTD.shape[1]):
        for rank in range(moe.chosen):
            for b in range(x_BTD.shape[0]):
                x_D = x_BTD[b, t]
                g_E = torch.softmax(made.router.weight @ x_D, 0)
                order = sorted(range(moe.experts), key=lambda e: -g_E[e].item())[: moe.chosen]
                weight = g_E[order[rank]]
                if moe.chosen > 1:
                    weight = weight / sum(g_E[e] for e in order)
                e = order[rank]
                if limit is not None and used[e] == limit:
                    dropped += 1
                    continue
                used[e] += 1
                hidden = F.silu(experts.gate[e] @ x_D) * (experts.up[e] @ x_D)
                out_BTD[b, t] += weight * (experts.down[e] @ hidden)
    if made.shared is not None:
        s = made.shared
        hidden = F.silu(x_BTD @ s.gate.weight.T) * (x_BTD @ s.up.weight.T)
        out_BTD = out_BTD + hidden @ s.down.weight.T
    return out_BTD, dropped


@pytest.mark.parametrize("chosen", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.6, 1.0, None])
def test_outputs_and_gradients_equal_a_loop_over_tokens_and_experts(
    chosen: int, factor: float | None
) -> None:
    made = layer(chosen=chosen, capacity_factor=factor, shared_experts=chosen % 2, collapse_load_ratio=None)
    x_BTD, probe = states(), torch.randn(BATCH, CONTEXT, WIDTH, dtype=torch.float64)
    limit = None if factor is None else math.ceil(factor * BATCH * CONTEXT * chosen / 4)
    found, gradients = [], []
    for compute in (lambda x: made(x), lambda x: by_loops(made, x, limit)[0]):
        x = x_BTD.clone().requires_grad_()
        made.zero_grad()
        out = compute(x)
        (out * probe).sum().backward()
        found.append(out)
        gradients.append([x.grad, *(p.grad for p in made.parameters())])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    dropped = by_loops(made, x_BTD, limit)[1]
    assert made.routing is not None
    assert int(made.routing.dropped) == dropped
    assert (dropped > 0) == (factor is not None)
    assert float(made.routing.load_E.sum()) == BATCH * CONTEXT * chosen


@pytest.mark.parametrize("kernel", ["runs", "padded"])
@pytest.mark.parametrize("limit", [None, 9])
def test_every_kernel_gives_the_slices_outputs_and_gradients(kernel: ExpertKernel, limit: int | None) -> None:
    torch.manual_seed(0)
    made = Experts(6, 32, 48, 1.0).double()
    x_ND = torch.randn(40, 32, dtype=torch.float64, requires_grad=True)
    weights_NK = torch.rand(40, 2, dtype=torch.float64, requires_grad=True)
    logits_NE = torch.randn(40, 6) + torch.tensor([0.0, 1.0, 0.0, -99.0, 0.0, 0.0])  # one expert has no token
    sent = dispatch(logits_NE.topk(2).indices, 2, 6, limit)
    found = []
    for made.kernel in ("slices", kernel):
        out_ND = made(x_ND, weights_NK, sent)
        given = [x_ND, weights_NK, *made.parameters()]
        found.append([out_ND, *torch.autograd.grad(out_ND.square().sum(), given)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_runs_join_experts_of_like_loads_and_leave_the_others_alone() -> None:
    assert runs_of([259, 273, 283, 248], "slices") == tuple(
        Run(e, e + 1, size) for e, size in enumerate([259, 273, 283, 248])
    )
    assert runs_of([259, 273, 283, 248], "padded") == (Run(0, 4, 283),)
    assert runs_of([256, 256, 1000, 250, 256], "runs") == (Run(0, 2, 256), Run(2, 3, 1000), Run(3, 5, 256))
    assert runs_of([0, 0, 0], "padded") == (Run(0, 3, 0),)


def test_a_kernel_is_measured_without_a_draw_from_torchs_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    name, seconds = measure(4, 8, 16, 12, 2, torch.float32, torch.device("cpu"), seconds=0.0)
    assert seconds.keys() == set(KERNELS)
    assert seconds[name] == min(seconds.values())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_run_follows_its_checkpoints_kernel_or_is_refused() -> None:
    plain = {"vocab_size": 4096, "n_layers": 1, "d_model": 16, "n_heads": 2, "max_context_tokens": 16}
    mixed = {**plain, "moe": {"experts": 2, "chosen": 1}}
    config = PretrainConfig.model_validate(
        {
            "model": mixed,
            "training": {"expert_kernel": "padded"},
            "data": {"corpora": [{"kind": "python_source"}]},
        }
    )
    model = Transformer(config.model)
    assert choose_kernels(model, config, torch.device("cpu")) == {"experts": "padded"}
    found: Any = SimpleNamespace(address="step-1", manifest={"kernels": {"experts": "runs"}})
    assert follow_kernels(model, found) == {"experts": "runs"}
    assert [layer.experts.kernel for layer in mixtures(model)] == ["runs"]
    found.manifest = {}
    assert follow_kernels(model, found) is None  # a checkpoint from before there was a choice
    found.manifest = {"kernels": {"experts": "amx"}}
    with pytest.raises(CheckpointError, match="'amx' for its experts, which this version does not have"):
        follow_kernels(model, found)
    assert follow_kernels(Transformer(ModelConfig(**plain)), found) == {}


@pytest.mark.parametrize("chosen", [1, 2])
@pytest.mark.parametrize("factor", [None, 0.6])
@pytest.mark.parametrize("estimator", ["top_k", "gumbel", "soft_to_hard"])
def test_gradients_pass_finite_differences(chosen: int, factor: float | None, estimator: str) -> None:
    if estimator == "soft_to_hard" and factor is not None:
        pytest.skip("refused: a dense mixture drops nothing")
    losses = {"z_loss_weight": 0.1, "margin": 3.0, "margin_weight": 0.1, "balance": {"kind": "symmetric_kl"}}
    losses |= {} if factor is None else {"hinge_weight": 0.5}
    made = layer(chosen=chosen, capacity_factor=factor, estimator=estimator, **losses)
    x_BTD = states().requires_grad_()

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(2)  # of gumbel's draw
        out = torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), (x,))
        assert made.routing is not None
        assert (int(made.routing.dropped) > 0) == (factor is not None)
        return torch.stack([out.square().sum(), *made.routing.losses.values()])

    names = [name for name, _ in made.named_parameters()]
    assert torch.autograd.gradcheck(loss, (x_BTD, *made.parameters()), eps=1e-6, atol=1e-6)


def test_straight_through_has_the_hard_value_and_the_soft_derivative() -> None:
    z_NE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    choice, hard = gate.choose(z_NE, 2, "straight_through", 1.0), gate.top_k(z_NE, 2)
    assert torch.equal(choice.weights_NK, hard.weights_NK)
    probe = torch.randn(5, 2, dtype=torch.float64)
    (ours,) = torch.autograd.grad((choice.weights_NK * probe).sum(), z_NE)
    (soft,) = torch.autograd.grad((z_NE.softmax(-1).gather(1, hard.experts_NK) * probe).sum(), z_NE)
    torch.testing.assert_close(ours, soft)
    assert (ours.abs() > 1e-4).all()  # also of logits that were not chosen


def test_gumbel_draws_from_the_softmax_at_its_temperature() -> None:
    logits_NE = torch.tensor([1.0, 0.0, -1.0, 0.5]).expand(40_000, 4)
    torch.manual_seed(0)
    for tau in (0.5, 2.0):
        first = gate.choose(logits_NE, 2, "gumbel", tau).experts_NK[:, 0]
        shares_E = torch.bincount(first, minlength=4) / len(first)
        torch.testing.assert_close(shares_E, (logits_NE[0] / tau).softmax(0), atol=0.01, rtol=0)


def test_soft_to_hard_tends_to_the_hard_choice() -> None:
    made = layer(
        estimator="soft_to_hard", chosen=1, tau={"start": 1.0, "end": 0.01}, collapse_load_ratio=None
    )
    x_BTD, gaps = states(), []
    served = made.eval()(x_BTD)
    made.train()
    for made.tau in (1.0, 0.1, 0.01):
        gaps.append((made(x_BTD) - served).abs().max().item())
    assert gaps[0] > gaps[1] > 10 * gaps[2]


def test_soft_to_hard_is_balanced_by_what_evaluation_will_choose() -> None:
    """All experts take all tokens in training, which says nothing of the gate: a collapse is seen, and fought."""
    made = layer(estimator="soft_to_hard", experts=4, chosen=1, balance={"kind": "switch"})
    x_BTD = states().abs()
    with torch.no_grad():
        made.router.weight.mul_(0.01)[0] = 0.1  # every token prefers expert 0
    made(x_BTD)
    assert made.routing is not None
    assert made.routing.load_E.tolist() == [BATCH * CONTEXT, 0, 0, 0]
    assert float(balance.load_ratio(made.routing.load_E)) == 4
    assert int(made.routing.dropped) == 0
    made.routing.losses["balance"].backward()
    assert made.router.weight.grad is not None
    assert float(made.router.weight.grad.abs().max()) > 1e-5


@pytest.mark.parametrize("chosen", [1, 2])
def test_no_edit_reaches_back_at_full_experts(chosen: int) -> None:
    """A token edited so that it wants the fullest expert more than anybody takes no earlier token's slot."""
    made = layer(chosen=chosen, capacity_factor=0.5, collapse_load_ratio=None)
    x_BTD = states(3, 8)
    before = made(x_BTD)
    assert made.routing is not None
    assert int(made.routing.dropped) > 0
    favourite = int(made.routing.load_E.argmax())
    silent = (before == 0).all(-1)
    assert chosen > 1 or silent.any()  # dropped tokens are among those that must not change
    moved = 0
    for t in range(1, 8):
        for row in range(3):
            edited = x_BTD.clone()
            edited[row, t] = 5 * made.router.weight[favourite].detach()
            after = made(edited)
            torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-14)
            moved += int(not torch.allclose(after[:, t + 1 :], before[:, t + 1 :]))
    assert moved > 0  # slots are contested: later tokens do lose or gain one


def test_a_model_at_full_experts_shows_no_token_its_future() -> None:
    model = Transformer(small(capacity_factor=0.5))
    tokens_BT = torch.randint(0, 97, (2, 20))
    before = model(tokens_BT)
    assert all(m.routing and int(m.routing.dropped) > 0 for m in mixtures(model))
    for t in (1, 7, 19):
        edited = tokens_BT.clone()
        edited[0, t:] = (edited[0, t:] + 13) % 97
        after = model(edited)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-5)
        assert (after[0, t:] - before[0, t:]).abs().amax(-1).min() > 0


def test_evaluation_drops_nothing_unless_it_is_told_to() -> None:
    made, roomy = layer(capacity_factor=0.5), layer(capacity_factor=None)
    x_BTD = states()
    assert torch.equal(made.eval()(x_BTD), roomy.train()(x_BTD))
    assert torch.equal(made(x_BTD), layer(capacity_factor=2.0)(x_BTD))  # 2 = E/k: room for everything
    assert not torch.equal(made.train()(x_BTD), made.eval()(x_BTD))
    whole = made.eval()(x_BTD)
    made.evaluation_capacity_factor = 2.0
    assert torch.equal(made(x_BTD), whole)
    made.evaluation_capacity_factor = 0.5
    assert not torch.equal(made(x_BTD), whole)


# Capacity of a sequence


def kept_by_loops(experts_TK: list[list[int]], factor: Fraction, k: int, experts: int) -> list[list[bool]]:
    """docs/theory B.5 read out loud: for each position and choice, take a place if there is one."""
    taken, kept = [0] * experts, []
    for t, chosen in enumerate(experts_TK):
        bound = math.ceil(factor * (t + 1) * k / experts)
        kept.append([taken[r] < bound for r in chosen])
        for r, found in zip(chosen, kept[-1], strict=True):
            taken[r] += found
    return kept


def some_choices(rows: int, context: int, k: int, experts: int) -> Tensor:
    """(B, T, K), some experts more often than others."""
    torch.manual_seed(3)
    return (torch.randn(rows, context, experts) + torch.linspace(0, 2, experts)).topk(k).indices


@pytest.mark.parametrize(("k", "experts"), [(1, 2), (1, 8), (2, 5), (3, 4)])
@pytest.mark.parametrize("factor", ["0.3", "0.7", "1", "1.1", "1.25", "9"])
def test_places_are_those_of_a_loop_however_a_sequence_is_cut(k: int, experts: int, factor: str) -> None:
    experts_BTK = some_choices(4, 60, k, experts)
    wanted = [kept_by_loops(row, Fraction(factor), k, experts) for row in experts_BTK.tolist()]
    bound_BT = bounds(torch.arange(60), float(factor), k, experts).expand(4, -1)
    for cuts in ((60,), (7, 1, 30, 22), (1,) * 60):
        taken_BE, parts, at = experts_BTK.new_zeros(4, experts), [], 0
        for size in cuts:
            some, bound = experts_BTK[:, at : at + size], bound_BT[:, at : at + size]
            kept_BTK, after_BE = keep(some, bound, taken_BE)
            if size == 1:
                next_BK, next_BE = keep_next(some[:, 0], bound[:, 0], taken_BE)
                assert torch.equal(next_BK, kept_BTK[:, 0])
                assert torch.equal(next_BE, after_BE)
            parts.append(kept_BTK)
            taken_BE, at = after_BE, at + size
        assert torch.cat(parts, 1).tolist() == wanted
    dropped = 1 - torch.tensor(wanted).double().mean()
    assert (dropped > 0) == (float(factor) < 2)


@pytest.mark.parametrize("factor", ["0.1", "1.1", "0.7", "1.15", "0.3333", "3.3"])
def test_an_exact_multiple_is_not_rounded_up(factor: str) -> None:
    for k, experts in ((1, 8), (2, 8), (2, 10), (6, 128)):
        exact = [min(t + 1, math.ceil(Fraction(factor) * (t + 1) * k / experts)) for t in range(3000)]
        assert bounds(torch.arange(3000), float(factor), k, experts).tolist() == exact
    assert math.ceil(1.1 * 100 * 2 / 4) == 56  # which is 55
    assert bounds(torch.tensor([99, 10**9 - 2]), 1.1, 2, 4).tolist() == [55, 549_999_999 + 1]
    assert bounds(torch.tensor([0, 5]), 1e-30, 1, 2).tolist() == [1, 1]
    assert bounds(torch.tensor([0, 10**9 - 2]), 1e30, 1, 2).tolist() == [1, 10**9 - 1]


@pytest.mark.parametrize("chosen", [1, 2])
def test_in_evaluation_a_row_s_places_are_its_own(chosen: int) -> None:
    made = layer(chosen=chosen, evaluation_capacity_factor=0.75, shared_experts=1, collapse_load_ratio=None)
    made.eval()
    x_BTD = states(5, 24)
    together = made(x_BTD)
    alone = torch.cat([made(x_BTD[row : row + 1]) for row in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made(x_BTD[:, :13]), together[:, :13], rtol=1e-12, atol=1e-14)
    experts_NK = made.served_choice(made.router(x_BTD.flatten(0, 1))).experts_NK
    rows = experts_NK.view(5, 24, chosen).tolist()
    dropped = [kept_by_loops(row, Fraction("0.75"), chosen, 4) for row in rows]
    made.evaluation_capacity_factor = None
    changed = ((made(x_BTD) - together).abs() > 1e-9).any(-1)
    assert changed.tolist() == [[not all(token) for token in row] for row in dropped]
    assert 0 < changed.double().mean() < 1


def test_noise_is_for_training_alone() -> None:
    made, plain = layer(noise_std=2.0), layer()
    x_BTD = states()
    assert torch.equal(made.eval()(x_BTD), plain.eval()(x_BTD))
    made.train()
    assert not torch.equal(made(x_BTD), made(x_BTD))


# Balance


def collapsed_gate() -> tuple[Tensor, Tensor]:
    """Inputs with a constant channel, and a router that gives expert 0 a logit of 5 by it; other weights random."""
    torch.manual_seed(0)
    x_ND = torch.randn(2048, 16, dtype=torch.float64)
    x_ND[:, 0] = 1
    weight_ED = torch.randn(8, 16, dtype=torch.float64) / 4
    weight_ED[:, 0] = 0
    weight_ED[0, 0] = 5
    return x_ND, weight_ED.requires_grad_()


@pytest.mark.parametrize("kind", ["symmetric_kl", "quadratic", "switch"])
def test_balance_alone_undoes_a_collapse(kind: str) -> None:
    x_ND, weight_ED = collapsed_gate()
    values, ratios, distances = [], [], []
    for _ in range(200):
        logits_NE = x_ND @ weight_ED.T
        log_p_E = balance.log_mean_probability(logits_NE.log_softmax(-1))
        load_E = torch.bincount(gate.top_k(logits_NE, 2).experts_NK.flatten(), minlength=8).double()
        loss = balance.switch(log_p_E, load_E) if kind == "switch" else getattr(balance, kind)(log_p_E)
        values.append(balance.symmetric_kl(log_p_E).item())
        ratios.append(float(balance.load_ratio(load_E)))
        distances.append((log_p_E.exp() - 1 / 8).norm().item())
        (gradient,) = torch.autograd.grad(loss, weight_ED)
        with torch.no_grad():
            weight_ED -= 0.2 * gradient
    assert ratios[0] == 4.0  # all tokens have expert 0
    assert ratios[-1] < 1.25
    if kind != "switch":  # its hard fractions are piecewise constant: V may rise
        assert distances[-1] < 1e-2
        rises = [later - earlier for earlier, later in pairwise(values)]
        assert max(rises) < 1e-14  # rounding of the logarithms, where V itself is that small


def small(**moe: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=97, n_layers=2, d_model=32, n_heads=2, d_ff=48, max_context_tokens=32,
        moe={"experts": 4, "chosen": 2, "d_ff": 24, **moe},
    )  # fmt: skip


def test_counts_and_saved_tensors_are_the_built_model_s() -> None:
    config = small(shared_experts=1, every=2)
    with torch.device("meta"):
        model = Transformer(config)
    counts = parameter_counts(config)
    assert counts.n_total == sum(p.numel() for p in model.parameters())
    (mixture,) = mixtures(model)
    idle = 2 * sum(p[0].numel() for p in mixture.experts.parameters())  # two of four experts
    assert counts.n_active == counts.n_total - idle


@pytest.mark.parametrize(
    "moe", [{}, {"shared_experts": 1}, {"estimator": "soft_to_hard"}, {"capacity_factor": 0.5}]
)
def test_a_mixture_keeps_as_much_for_its_backward_pass_as_is_counted(moe: dict[str, Any]) -> None:
    config = ModelConfig(d_model=32, n_heads=2, d_ff=48, moe={"capacity_factor": None, **moe})
    assert config.moe is not None
    made, x_BTD = MixtureOfExperts(config, config.moe, 1.0), torch.randn(4, 32, 32, requires_grad=True)
    known = {p.untyped_storage().data_ptr() for p in (x_BTD, *made.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = made(x_BTD)
    dense = ModelConfig(**{**config.model_dump(), "moe": None})
    per_token = [saved_elements_per_token(c, False).working for c in (config, dense)]
    counted = per_token[0] - per_token[1] + 3 * config.ff_size
    assert out.shape == x_BTD.shape
    assert sum(kept.values()) / 4 / 128 == pytest.approx(counted, rel=0.05)


# In training


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Told:
    """What a reporter was told."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.tags: dict[str, str] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.values = values

    def tag(self, key: str, value: str) -> None:
        self.tags[key] = value


@pytest.mark.parametrize(("bias", "collapses"), [(0.01, True), (0.0, False)])
def test_a_near_tie_that_sends_every_token_one_way_is_a_collapse(
    alone: None, bias: float, collapses: bool
) -> None:
    """p is almost even (V about 1e-5), which is why the event is of the hard load."""
    config = ModelConfig(d_model=9, n_heads=1, head_dim=2, d_ff=4, moe={"experts": 8, "chosen": 1})
    assert config.moe is not None
    made, told = MixtureOfExperts(config, config.moe, 1.0), Told()
    x_BTD = F.pad(torch.randn(4, 64, 8), (0, 1), value=1.0)
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[0, 8] = bias
        if not collapses:
            made.router.weight[:, :8] = 1e-3 * torch.eye(8)
    routers = Routers(made, total_steps=10)
    for _ in range(2):
        made(x_BTD)
        routers.loss()
    routers.report(3, told)
    assert told.values["router_balance_nats"] < 2e-5
    assert told.values["router_balance_distance"] < 2e-3
    assert told.values["expert_load_ratio"] == 8.0 if collapses else told.values["expert_load_ratio"] < 2
    assert told.values["gate_entropy_nats"] == pytest.approx(math.log(8), abs=1e-4)
    assert told.values["expert_overflow"] == pytest.approx(1 - 1.25 / 8 if collapses else 0, abs=0.1)
    assert told.values["collapsed_layers"] == collapses
    assert (
        told.values["balance_weight"] == pytest.approx(0.01)
        if collapses
        else told.values["balance_weight"] > 0
    )
    assert (COLLAPSE_TAG in told.tags) == collapses
    assert routers.metrics() == {}  # read once


def test_lambda_falls_once_the_hard_load_is_balanced_and_returns() -> None:
    config = BalanceConfig(kind="symmetric_kl", weight=0.02, balanced_fraction=0.25)
    log_p_E = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    for load, expected in (([50, 50, 60, 40], 0.005), ([90, 50, 30, 30], 0.02)):
        loss, weight = balance.balance_loss(config, log_p_E, torch.tensor(load).float())
        assert float(weight) == pytest.approx(expected)
        assert float(loss) == pytest.approx(expected * float(balance.symmetric_kl(log_p_E)))


def test_tau_falls_to_its_end_and_stays() -> None:
    tau = Annealing(start=2.0, end=0.5, fraction=0.5)
    values = [temperature(step, 101, tau) for step in range(101)]
    assert values[0] == 2.0
    assert values[25] == pytest.approx(1.0)
    assert values[50:] == [pytest.approx(0.5)] * 51


def test_auxiliary_losses_add_up_over_layers_and_recomputation_changes_no_gradient() -> None:
    torch.manual_seed(0)
    model = Transformer(small(noise_std=0.5, z_loss_weight=0.1, capacity_factor=0.75))
    tokens_BT = torch.randint(0, 97, (2, 16))
    gradients = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        logits = model(tokens_BT)
        losses = model.auxiliary_losses()
        assert set(losses) == {"balance", "router_z"}
        layers = [mixture.routing.losses for mixture in mixtures(model) if mixture.routing]
        assert losses["balance"].item() == pytest.approx(sum(layer["balance"].item() for layer in layers))
        (F.cross_entropy(logits.flatten(0, 1), tokens_BT.flatten()) + sum(losses.values())).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_bf16_stays_near_fp32() -> None:
    model = Transformer(small(capacity_factor=None))
    low = copy.deepcopy(model).bfloat16()
    tokens_BT = torch.randint(0, 97, (2, 16))
    for each in (model, low):
        F.cross_entropy(each(tokens_BT).float().flatten(0, 1), tokens_BT.flatten()).backward()
    for full, half in zip(model.parameters(), low.parameters(), strict=True):
        assert half.grad is not None
        assert F.cosine_similarity(full.grad.flatten(), half.grad.float().flatten(), dim=0) > 0.98
