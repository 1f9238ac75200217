"""The mathematics that all forms share: powers of the inputs, losses and their derivatives (docs/theory D.1, D.3).

Inside a fit each log x is centred, so nothing depends on the units of N, D, T, C. Letters: B replicates or starts,
N points, K terms, P parameters (first the 1 + K coefficients, then the exponents).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from escala.laws.form import Form

Floats = NDArray[np.float64]
SMALLEST = 1e-9  # of a coefficient in a power mean, whose slope is not finite at 0


@dataclass(frozen=True)
class Features:
    """Logs of the inputs less their offsets: `main_KN`, and for N_eff the log of N_total/N_active,
    `mix_N`.
    """

    main_KN: Floats
    mix_N: Floats | None
    offset_K: Floats
    mix_offset: float


def make_features(
    form: Form, columns: Mapping[str, Floats], centred: tuple[bool, ...] | None = None
) -> Features:
    """Features of `columns` (positive arrays of one length). `centred` says, per term, whether its mean is
    taken off.
    """
    keep = centred if centred is not None else (True,) * len(form.terms)
    main_KN = np.stack([np.log(columns[term.column]) for term in form.terms])
    offset_K = np.where(keep, main_KN.mean(axis=1), 0.0)
    mix_N = _log_ratio(form, columns)
    if mix_N is None:
        return Features(main_KN - offset_K[:, None], None, offset_K, 0.0)
    mix_offset = float(mix_N.mean()) if keep[0] else 0.0
    return Features(main_KN - offset_K[:, None], mix_N - mix_offset, offset_K, mix_offset)


def plain_features(form: Form, columns: Mapping[str, Floats]) -> Features:
    """Features of `columns` without offsets: for parameters of the formula."""
    main_KN = np.stack([np.log(columns[term.column]) for term in form.terms])
    return Features(main_KN, _log_ratio(form, columns), np.zeros(len(form.terms)), 0.0)


def _log_ratio(form: Form, columns: Mapping[str, Floats]) -> Floats | None:
    """log N_total/N_active; None for a form of one N."""
    if form.mix is None:
        return None
    log_N: Floats = np.log(columns[form.mix.over.name]) - np.log(columns[form.terms[0].column])
    return log_N


def to_natural(form: Form, theta_BP: Floats, features: Features) -> Floats:
    """Parameters of the centred problem -> those of the formula (a in nats * N^alpha, and so on). (B, P) ->
    (B, P).
    """
    out = theta_BP.copy()
    k = len(form.terms)
    for i, term in enumerate(form.terms):
        shift_B = theta_BP[:, 1 + k + i] * (
            features.offset_K[i] + (theta_BP[:, -1] * features.mix_offset if term.mix else 0.0)
        )
        out[:, 1 + i] *= np.exp(shift_B)
    return out


def term_powers(form: Form, theta_BP: Floats, features: Features) -> tuple[list[Floats], list[Floats]]:
    """Per term: x^-exponent (B, N), and log x as the term sees it ((1, N), or (B, N) for N_eff)."""
    k = len(form.terms)
    powers, logs = [], []
    for i, term in enumerate(form.terms):
        log_BN = features.main_KN[i][None, :]
        if term.mix and features.mix_N is not None:
            log_BN = log_BN + theta_BP[:, -1:] * features.mix_N
        powers.append(np.exp(-theta_BP[:, 1 + k + i, None] * log_BN))
        logs.append(log_BN)
    return powers, logs


@dataclass(frozen=True)
class Joined:
    """Terms in a power mean, M = (sum of t^(1/gamma))^gamma with t = c x^-e, and what its derivatives are made of."""

    mean_BN: Floats
    share_KBN: Floats  # of each term in the sum of powers; dM/dlog t = M share
    entropy_BN: Floats  # of the shares; dM/dgamma = M entropy
    log_share_KBN: Floats
    slope_KBN: Floats  # dM/dt


def join(theta_BP: Floats, powers: list[Floats]) -> Joined:
    """The power mean of a form's terms; its gamma is the last parameter."""
    gamma_B1 = theta_BP[:, -1:]
    coefficient_KB1 = theta_BP[:, 1 : 1 + len(powers)].T[:, :, None]
    log_KBN = np.log(np.maximum(coefficient_KB1, SMALLEST)) + np.log(np.stack(powers))
    top_BN = log_KBN.max(axis=0)
    log_share_KBN = (log_KBN - top_BN) / gamma_B1
    log_sum_BN = np.log(np.exp(log_share_KBN).sum(axis=0))
    log_share_KBN -= log_sum_BN
    share_KBN = np.exp(log_share_KBN)
    mean_BN = np.exp(top_BN + gamma_B1 * log_sum_BN)
    entropy_BN = -(share_KBN * log_share_KBN).sum(axis=0)
    slope_KBN = mean_BN * share_KBN * np.exp(-log_KBN)
    return Joined(mean_BN, share_KBN, entropy_BN, log_share_KBN, slope_KBN)


def losses(form: Form, theta_BP: Floats, features: Features) -> Floats:
    """The law's loss in nats per token: (B, P) parameters at N points -> (B, N)."""
    powers, _ = term_powers(form, theta_BP, features)
    if form.join is not None:
        return theta_BP[:, :1] + join(theta_BP, powers).mean_BN
    loss_BN = np.repeat(theta_BP[:, :1], features.main_KN.shape[1], axis=1)
    for i, power_BN in enumerate(powers):
        loss_BN += theta_BP[:, 1 + i, None] * power_BN
    return loss_BN


def loss_and_jacobian(form: Form, theta_BP: Floats, features: Features) -> tuple[Floats, Floats]:
    """Loss (B, N) and its derivative by every parameter (B, P, N). For a coefficient's log, multiply by the
    coefficient.
    """
    k = len(form.terms)
    powers, logs = term_powers(form, theta_BP, features)
    jacobian_BPN = np.empty((*theta_BP.shape, features.main_KN.shape[1]))
    jacobian_BPN[:, 0] = 1.0
    joined = None if form.join is None else join(theta_BP, powers)
    if joined is not None:
        powers = [power * slope for power, slope in zip(powers, joined.slope_KBN, strict=True)]
        jacobian_BPN[:, -1] = joined.mean_BN * joined.entropy_BN
    loss_BN = np.repeat(theta_BP[:, :1], features.main_KN.shape[1], axis=1)
    for i, term in enumerate(form.terms):
        part_BN = theta_BP[:, 1 + i, None] * powers[i]
        loss_BN += part_BN
        jacobian_BPN[:, 1 + i] = powers[i]
        jacobian_BPN[:, 1 + k + i] = -part_BN * logs[i]
        if term.mix and features.mix_N is not None:
            jacobian_BPN[:, -1] = -part_BN * theta_BP[:, 1 + k + i, None] * features.mix_N
    if joined is not None:
        loss_BN = theta_BP[:, :1] + joined.mean_BN
    return loss_BN, jacobian_BPN
