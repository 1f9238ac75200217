"""The forms of a law, their gradients and closed-form optima (SPEC.md D.1, D.3, D.4).

Every form is L = L_inf + sum over terms of coefficient * x^-exponent. Inside a fit each log x is centred, so
nothing depends on the units of N, D, T, C. Letters: B replicates or starts, N points, K terms, P parameters
(first the 1 + K coefficients, then the exponents).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from escala.contract.errors import LawError

Floats = NDArray[np.float64]

EXPONENT_BOUNDS = (1e-6, 2.0)  # the open interval (0, 2); at 0 a term is a constant, which L_inf already is
MIX_BOUNDS = (0.0, 1.0)  # rho: N_eff between N_active and N_total


@dataclass(frozen=True)
class Term:
    """coefficient * x^-exponent, where log x = log column + mix * log ratio (mix and ratio only for
    N_eff).
    """

    coefficient: str
    exponent: str
    column: str
    mix: str | None = None


@dataclass(frozen=True)
class Form:
    """A functional form; `columns` are what a point must carry besides its loss."""

    name: str
    terms: tuple[Term, ...]
    formula: str

    @property
    def coefficients(self) -> tuple[str, ...]:
        """L_inf and one coefficient per term."""
        return ("L_inf", *(term.coefficient for term in self.terms))

    @property
    def exponents(self) -> tuple[str, ...]:
        """One exponent per term, then rho where a term has N_eff."""
        return tuple(term.exponent for term in self.terms) + tuple(t.mix for t in self.terms if t.mix)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the order of the internal vector."""
        return self.coefficients + self.exponents

    @property
    def columns(self) -> tuple[str, ...]:
        """Inputs of the law ("size" stands for the chosen N)."""
        seen: dict[str, None] = {}
        for term in self.terms:
            seen.update(dict.fromkeys(("n_active", "n_total") if term.mix else (term.column,)))
        return tuple(seen)

    @property
    def mixed(self) -> bool:
        """Whether the form has N_eff = N_total^rho N_active^(1-rho)."""
        return any(term.mix for term in self.terms)

    def bounds(self) -> tuple[Floats, Floats]:
        """Lower and upper bounds, in the order of `names`."""
        k = len(self.coefficients)
        low = [0.0] * k + [EXPONENT_BOUNDS[0]] * len(self.terms) + [MIX_BOUNDS[0]] * self.mixed
        high = [math.inf] * k + [EXPONENT_BOUNDS[1]] * len(self.terms) + [MIX_BOUNDS[1]] * self.mixed
        return np.array(low), np.array(high)


_N = Term("a", "alpha", "size")
_D = Term("b", "beta", "tokens")
_T = Term("c", "zeta", "context_tokens")
_MOE = Term("a", "alpha", "n_active", mix="rho")
_CF = Term("q", "eta", "capacity_factor")
_N_EFF = "L_inf + a N_eff^-alpha + b D^-beta"

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("nd", (_N, _D), "L_inf + a N^-alpha + b D^-beta"),
        Form("ndt", (_N, _D, _T), "L_inf + a N^-alpha + b D^-beta + c T^-zeta"),
        Form("moe", (_MOE, _D), f"{_N_EFF}, N_eff = N_total^rho N_active^(1-rho)"),
        Form(
            "moe_cf",
            (_MOE, _D, _CF),
            f"{_N_EFF} + q capacity_factor^-eta, N_eff = N_total^rho N_active^(1-rho)",
        ),
        Form("c", (Term("a", "alpha", "compute_flops"),), "L_inf + a C^-alpha"),
        Form("joules", (Term("a", "alpha", "energy_joules"),), "L_inf + a J^-alpha"),
    )
}


def get_form(name: str) -> Form:
    """The form called `name`; raises LawError for an unknown one."""
    if name not in FORMS:
        raise LawError(f"There is no form '{name}'.", f"Choose one of: {', '.join(FORMS)}.")
    return FORMS[name]


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
    if not form.mixed:
        return Features(main_KN - offset_K[:, None], None, offset_K, 0.0)
    mix_N = np.log(columns["n_total"]) - np.log(columns["n_active"])
    mix_offset = float(mix_N.mean()) if keep[0] else 0.0
    return Features(main_KN - offset_K[:, None], mix_N - mix_offset, offset_K, mix_offset)


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


def losses(form: Form, theta_BP: Floats, features: Features) -> Floats:
    """The law's loss in nats per token: (B, P) parameters at N points -> (B, N)."""
    powers, _ = term_powers(form, theta_BP, features)
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
    loss_BN = np.repeat(theta_BP[:, :1], features.main_KN.shape[1], axis=1)
    for i, term in enumerate(form.terms):
        part_BN = theta_BP[:, 1 + i, None] * powers[i]
        loss_BN += part_BN
        jacobian_BPN[:, 1 + i] = powers[i]
        jacobian_BPN[:, 1 + k + i] = -part_BN * logs[i]
        if term.mix and features.mix_N is not None:
            jacobian_BPN[:, -1] = -part_BN * theta_BP[:, 1 + k + i, None] * features.mix_N
    return loss_BN, jacobian_BPN


@dataclass(frozen=True)
class Optimum:
    """The cheapest split of a budget under a law. `multiplier` is N_total/N_active."""

    size: float
    tokens: float
    loss_nats: float
    multiplier: float
    residual: float  # first-order condition, relative: alpha a N^-alpha / (beta b D^-beta) - 1


def closed_form_optimum(
    form: Form,
    parameters: Mapping[str, float],
    compute_flops: float,
    *,
    kappa: float = 6.0,
    context_tokens: float | None = None,
    n_total_over_active: float | None = None,
) -> Optimum:
    """Minimise the loss over N and D at C = kappa N D (SPEC.md D.4; Hoffmann et al. 2022, eq. 4).

    For moe, N is N_active at the given N_total/N_active: a becomes a ratio^(-alpha rho).
    Raises LawError for form c, a missing T or ratio, and a law whose optimum lies at a boundary.
    """
    _check_question(form, compute_flops, kappa, context_tokens, n_total_over_active)
    alpha, beta, a, b = (parameters[name] for name in ("alpha", "beta", "a", "b"))
    ratio = n_total_over_active if form.mixed and n_total_over_active else 1.0
    constant = parameters["L_inf"]
    if form.mixed:
        a *= ratio ** (-alpha * parameters["rho"])
    if form.name == "ndt" and context_tokens:
        constant += parameters["c"] * context_tokens ** -parameters["zeta"]
    if min(a, b, alpha, beta) <= 0.0:
        raise LawError(
            "The law has no interior optimum: the term of N or of D is zero.",
            "Measure runs that vary both N and D, and fit again.",
        )
    budget = compute_flops / kappa
    log_n = (math.log(alpha * a) - math.log(beta * b) + beta * math.log(budget)) / (alpha + beta)
    size, tokens = math.exp(log_n), math.exp(math.log(budget) - log_n)
    by_n, by_d = a * size**-alpha, b * tokens**-beta
    residual = alpha * by_n / (beta * by_d) - 1.0
    return Optimum(size, tokens, constant + by_n + by_d, ratio, residual)


def _check_question(
    form: Form, compute_flops: float, kappa: float, context: float | None, ratio: float | None
) -> None:
    """Raise LawError unless the question has a finite answer."""
    if form.name in ("c", "joules"):
        raise LawError(
            "A law of loss against compute or energy alone has no split of N and D.", "Fit form nd."
        )
    if form.name == "moe_cf":
        raise LawError(
            "Form moe_cf has no closed-form optimum: the loss falls with the capacity factor without a cost.",
            "Fit form moe at the capacity factor that you will train with.",
        )
    if not (math.isfinite(compute_flops) and compute_flops > 0 and math.isfinite(kappa) and kappa > 0):
        raise LawError(f"compute_flops {compute_flops} and kappa {kappa} must be positive.", "Say e.g. 1e21.")
    if form.name == "ndt" and not (context is not None and math.isfinite(context) and context > 0):
        raise LawError("This law depends on the context T.", "Give context_tokens, e.g. 2048.")
    if form.mixed and ratio is None:
        raise LawError(
            "Without a bound on N_total the optimum of a mixture of experts runs to infinity (SPEC.md D.3).",
            "Give n_total_over_active, e.g. 8 (public practice is 8 to 64).",
        )
    if form.mixed and not (ratio is not None and math.isfinite(ratio) and ratio >= 1):
        raise LawError(f"N_total/N_active cannot be {ratio}: experts add to N_total.", "Give a ratio >= 1.")
