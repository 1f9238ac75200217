from __future__ import annotations

import dataclasses
import math
import random
import statistics

import pytest
import torch

from escala.contract.errors import DataError, Diverged, SpecError
from workloads.alignment.advantages import gae, grpo, rloo, whiten
from workloads.alignment.calibration import (
    accuracy,
    calibration_curve,
    expected_calibration_error,
    explained_variance,
)
from workloads.alignment.losses import (
    ProportionalKL,
    ThresholdKL,
    bradley_terry,
    kl,
    kl_loss,
    policy_loss,
    value_loss,
)
from workloads.alignment.token_rewards import (
    RunningMoments,
    length_penalty,
    missing_eos_penalty,
    on_last_token,
    token_rewards,
)

ZEROS, ONES = torch.zeros(2, 2), torch.ones(2, 2)


def test_proportional_controller_follows_ziegler_and_resumes_from_its_coefficient() -> None:
    controller = ProportionalKL(0.2, target=6.0, horizon=10_000)
    expected = 0.2
    for measured, error in [(6.6, 0.1), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2), (6.0, 0.0)]:
        expected *= 1 + error * 256 / 10_000
        assert controller.update(measured, 256) == pytest.approx(expected, rel=1e-12)
    resumed = ProportionalKL(0.9, target=6.0, horizon=10_000)
    resumed.kl_coef = controller.kl_coef
    assert resumed.update(9.0, 64) == controller.update(9.0, 64)


def test_threshold_controller_moves_only_outside_its_band() -> None:
    controller = ThresholdKL(0.1, target=4.0)
    assert controller.update(8.0) == controller.update(2.0) == 0.1  # the band's ends are inside
    assert controller.update(8.1) == pytest.approx(0.15)
    assert controller.update(torch.tensor(1.9)) == pytest.approx(0.1)
    assert ThresholdKL(1.0, 4.0, high=3, low=0.1, factor=2).update(12.5) == 2.0


def test_controllers_keep_a_coefficient_of_zero() -> None:
    assert ProportionalKL(0.0, 6.0, 100).update(50.0, 10) == 0.0
    assert ThresholdKL(0.0, 6.0).update(50.0) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_stops(bad: float) -> None:
    for controller, arguments in ((ProportionalKL(0.1, 1.0, 100), (1,)), (ThresholdKL(0.1, 1.0), ())):
        with pytest.raises(Diverged, match="KL"):
            controller.update(bad, *arguments)
        assert controller.kl_coef == 0.1


def test_impossible_settings_are_refused_with_the_reason() -> None:
    refused = [
        (lambda: kl(ZEROS, ZEROS, "k4"), "k4"),
        (lambda: kl_loss(ZEROS, ZEROS, ONES, "k1"), "expectation of its gradient is zero"),
        (lambda: policy_loss(ZEROS, ZEROS, ZEROS, ONES, 0.2, 0.2, mode="mean"), "mean"),
        (lambda: policy_loss(ZEROS, ZEROS, ZEROS, ONES, 0.2, 0.2, dual_clip=1.0), "dual_clip"),
        (lambda: value_loss(ZEROS, ZEROS, ZEROS, ONES, clip=0.0), "value clip"),
        (lambda: grpo(torch.zeros(3), torch.tensor([0, 0, 1])), "one response alone"),
        (lambda: rloo(torch.zeros(1), torch.tensor([5])), "one response alone"),
        (lambda: length_penalty(torch.zeros(1), torch.ones(1), 5, 5, 1.0), "length penalty"),
        (lambda: ProportionalKL(-0.1, 1.0, 1.0), "kl_coef"),
        (lambda: ProportionalKL(0.1, 0.0, 1.0), "target"),
        (lambda: ProportionalKL(0.1, 1.0, 0.0), "horizon"),
        (lambda: ProportionalKL(0.1, 1.0, 10.0).update(0.0, 100), "negative"),
        (lambda: ThresholdKL(0.1, 1.0, high=0.5), "low < high"),
        (lambda: ThresholdKL(0.1, 1.0, factor=1.0), "factor"),
    ]
    for action, reason in refused:
        with pytest.raises(SpecError, match=reason) as caught:
            action()
        assert caught.value.hint


def test_shapes_that_broadcasting_would_hide_are_refused() -> None:
    square, row = torch.zeros(3, 3), torch.zeros(3)
    for action in (
        lambda: policy_loss(square, square, row, square, 0.2, 0.2),
        lambda: value_loss(square, square, row, square),
        lambda: gae(square, row, square, 1.0, 1.0),
        lambda: gae(square, square, square, 1.0, 1.0, torch.zeros(3, 1)),
        lambda: whiten(square, row),
        lambda: kl(square, row, "k1"),
        lambda: bradley_terry(row, square),
        lambda: bradley_terry(row, row, torch.zeros(3, 1)),
        lambda: grpo(row, torch.zeros(4)),
        lambda: token_rewards(torch.zeros(3, 1), square, square, square, 0.1),
    ):
        with pytest.raises(ValueError, match="shapes"):
            action()


def test_the_score_lands_on_the_last_valid_token_and_kl_is_subtracted() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]])
    scores = torch.tensor([2.0, -3.0, 0.5])
    placed = on_last_token(scores, mask)
    assert placed.tolist() == [[0, 2, 0, 0], [0, 0, 0, -3], [0.5, 0, 0, 0]]
    old = torch.where(mask.bool(), torch.tensor([[-1.0, -2.0, -3.0, -4.0]]), math.nan)
    reference = torch.full((3, 4), -2.5)
    rewards = token_rewards(scores, old, reference, mask, 0.1)
    # d = log pi_old - log pi_ref = 1.5, 0.5, -0.5, -1.5 by position
    expected = [[-0.15, 1.95, 0, 0], [0, -0.05, 0, -2.85], [0.35, 0, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected))
    with pytest.raises(ValueError, match="without a valid token"):
        on_last_token(torch.ones(1), torch.zeros(1, 3))


def test_penalties() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0, 1.0])
    finished = torch.tensor([True, False, True, False])
    assert missing_eos_penalty(scores, finished, 0.75).tolist() == [1.0, 0.25, 1.0, 0.25]
    lengths = torch.tensor([10, 100, 150, 500])
    assert length_penalty(scores, lengths, 100, 200, 2.0).tolist() == [1.0, 1.0, 0.0, -1.0]


def test_running_moments_are_those_of_everything_seen_and_survive_a_checkpoint() -> None:
    draw = random.Random(0)
    seen = [1000 + draw.gauss(0, 0.1) for _ in range(60)]
    running = RunningMoments()
    for start, end in ((0, 1), (1, 20), (20, 20), (20, 60)):
        running.update(torch.tensor(seen[start:end], dtype=torch.float64))
        running = RunningMoments(**dataclasses.asdict(running))
    assert running.mean == pytest.approx(statistics.fmean(seen), rel=1e-12)
    spread = statistics.stdev(seen)
    x = torch.tensor([1000.1, 999.8], dtype=torch.float64)
    expected = [(v - running.mean) / math.sqrt(spread**2 + 1e-8) for v in x.tolist()]
    assert running.normalise(x).tolist() == pytest.approx(expected, rel=1e-6)


def test_normalising_before_two_scores_is_refused() -> None:
    running = RunningMoments()
    running.update(torch.ones(1))
    with pytest.raises(ValueError, match="1 scores seen"):
        running.normalise(torch.ones(3))


def test_accuracy_counts_a_tie_as_half() -> None:
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 5.0, 1.0])
    assert accuracy(chosen, rejected).item() == 0.625


def test_calibration_curve_by_hand() -> None:
    probability = torch.tensor([0.0, 0.05, 0.1, 0.55, 0.6, 1.0], dtype=torch.float64)
    outcome = torch.tensor([0, 1, 0, 1, 1, 1])
    curve = calibration_curve(probability, outcome, 10)
    assert [(b.lower, b.upper, b.count) for b in curve] == [
        (0.0, 0.1, 2), (0.1, 0.2, 1), (0.5, 0.6, 1), (0.6, 0.7, 1), (0.9, 1.0, 1),
    ]  # fmt: skip
    assert (curve[0].probability, curve[0].outcome) == pytest.approx((0.025, 0.5))
    gaps = 2 * 0.475 + 0.1 + 0.45 + 0.4 + 0.0
    assert expected_calibration_error(curve) == pytest.approx(gaps / 6)


def test_calibration_error_tells_an_honest_forecaster_from_a_boaster() -> None:
    draw = random.Random(0)
    truth = [draw.random() for _ in range(20_000)]
    happened = torch.tensor([draw.random() < p for p in truth])
    honest = torch.tensor(truth, dtype=torch.float64)
    boast = torch.sigmoid(3 * torch.logit(honest))
    assert expected_calibration_error(calibration_curve(honest, happened, 10)) < 0.01
    # |sigmoid(3 logit p) - p| has mean 0.1414 for uniform p (integrated numerically)
    assert expected_calibration_error(calibration_curve(boast, happened, 10)) == pytest.approx(
        0.1414, abs=0.01
    )


def test_calibration_refuses_what_is_no_probability() -> None:
    one = torch.ones(1)
    for probability, outcome in ((1.5 * one, one), (math.nan * one, one), (one, 2 * one), (one[:0], one[:0])):
        with pytest.raises(DataError):
            calibration_curve(probability, outcome, 10)


def test_explained_variance() -> None:
    mask = torch.tensor([[1, 1, 1, 0]])
    returns = torch.tensor([[1.0, 2.0, 6.0, math.nan]])
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.full((1, 4), 3.0), returns, mask).item() == pytest.approx(0.0)
    assert explained_variance(torch.tensor([[1.0, 3.0, 5.0, 9.0]]), returns, mask).item() == pytest.approx(
        1 - 2 / 14
    )
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask).item())
