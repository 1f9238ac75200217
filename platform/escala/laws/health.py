"""What a fit does not tell: terms that the data do not identify, lack of fit, several regimes. In plain
words.

Thresholds were set on synthetic laws and on public tables (see benchmarks/laws.py); each is printed with its
number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from escala.laws.form import FLOOR, Form
from escala.laws.inputs import SIZE
from escala.laws.powers import Floats

SMALLEST_SPAN = 1.2  # a factor whose largest value is less than 1.2 times its smallest was hardly varied
LARGEST_CONDITION = 3e4  # of the unit-column Jacobian by log-coefficients and exponents
WIDEST_RATIO = 5.0  # upper over lower end of an identified exponent's 90 % interval
TAIL_SHARE, TAIL_SIGMAS, TAIL_SIZE = (
    0.02,
    6.0,
    0.1,
)  # several regimes: > 2 % of points beyond 6 robust sigmas and 10 % of loss
TREND_SHARE, TREND_SIZE = 0.5, 0.01  # lack of fit: a quadratic explains half of residuals of 1 % or more
COLUMN_CORRELATION = (
    0.5  # rank correlation of residuals with a column that the form does not use: always said,
)
COLUMN_SIZE = 0.03  # and a problem where the residuals' root mean square is more than 3 % of the loss


USUAL_RATIO = 20.0  # tokens per parameter, about which public laws are measured
FAR_RATIO = 3.0  # times above or below USUAL_RATIO
WORSE = 2.0  # times the other rows' root mean square residual: rows of another regime
FEWEST_ROWS = 5  # on either side of such a comparison
ROUNDING = 0.25  # of the residuals' root mean square that a loss's last digit explains: worth saying


@dataclass(frozen=True)
class Evidence:
    """What the checks read. `theta_P` and `replicates_BP` hold the formula's own parameters."""

    form: Form
    columns: dict[str, Floats]
    loss_N: Floats
    residual_N: Floats  # log residuals
    jacobian_PN: Floats  # of log loss by log-coefficients and exponents
    theta_P: Floats
    replicates_BP: Floats
    free_P: np.ndarray  # not fixed
    prior_P: np.ndarray  # has a prior
    unused: dict[str, Floats]  # numeric columns that the form does not use
    rows: int  # without copies of other rows


def problems(e: Evidence) -> list[str]:
    """Every reason why the law is not healthy; empty when there is none."""
    return [*_few_points(e), *_never_varied(e), *_not_identified(e), *_conditioning(e), *_several_regimes(e)]


def _few_points(e: Evidence) -> list[str]:
    n, p = e.rows, int(e.free_P.sum())
    if n >= 2 * p + 2 or e.prior_P.any():
        return []
    return [f"few points: {n} for {p} free parameters; intervals from fewer than {2 * p + 2} mean little"]


def _never_varied(e: Evidence) -> list[str]:
    out = []
    for term in e.form.terms:
        values_N = e.columns[term.column]
        if _free(e, term.coefficient) and _span(values_N) < SMALLEST_SPAN:
            factor = "" if term.mix else f" (factor {_span(values_N):.3g})"
            out.append(f"{term.column} was never varied{factor}: {term.not_identified}")
        if term.mix and _free(e, term.mix.parameter):
            name, span = term.mix.over.name, _span(e.columns[term.mix.over.name] / values_N)
            if span < SMALLEST_SPAN:
                out.append(
                    f"{name}/{term.column} was never varied (factor {span:.3g}): "
                    f"{term.mix.parameter} is not identified"
                )
    return out


def _span(values: Floats) -> float:
    return float(values.max() / values.min())


def _free(e: Evidence, name: str) -> bool:
    i = e.form.names.index(name)
    return bool(e.free_P[i] and not e.prior_P[i])


def _not_identified(e: Evidence) -> list[str]:
    """Parameters at a bound, in the fit or in more than 5 % of replicates, and intervals too wide to mean a
    value.
    """
    out = []
    smallest = 1e-6 * float(e.loss_N.min())
    parts, (lows, highs) = _shares(e), e.form.bounds()
    for i, name in enumerate(e.form.names):
        if not _free(e, name):
            continue
        draws = e.replicates_BP[:, i] if len(e.replicates_BP) else e.theta_P[None, i]
        if name in e.form.coefficients:
            zero = draws <= smallest if name == FLOOR else draws <= 0
            if parts[i] <= 1e-6:
                out.append(f"{name} is zero: the data do not identify this term")
            elif zero.mean() > 0.05:
                out.append(f"{name} is zero in {zero.mean():.0%} of bootstrap replicates: not identified")
            continue
        low, high = lows[i], highs[i]
        near = (draws <= low * 1.001 + 1e-9) | (draws >= high - 1e-3)
        if e.theta_P[i] <= low * 1.001 + 1e-9 or e.theta_P[i] >= high - 1e-3:
            out.append(f"{name} = {e.theta_P[i]:.3g} is at its bound: not identified")
        elif near.mean() > 0.05:
            out.append(f"{name} is at a bound in {near.mean():.0%} of bootstrap replicates: not identified")
        elif len(e.replicates_BP):
            is_share = e.form.mix is not None and name == e.form.mix.parameter
            out += _too_wide(name, draws, is_share)
    return out


def _too_wide(name: str, draws: Floats, is_share: bool) -> list[str]:
    low, high = (float(q) for q in np.quantile(draws, [0.05, 0.95]))
    wide = high - low > 0.8 if is_share else high > WIDEST_RATIO * low
    return [f"{name} is hardly identified: its 90 % interval is {low:.3g} to {high:.3g}"] if wide else []


def _shares(e: Evidence) -> Floats:
    """The largest share of any point's loss that each coefficient's term carries (exponents: 1)."""
    share = np.ones(len(e.theta_P))
    k = len(e.form.coefficients)
    share[:k] = np.abs(e.jacobian_PN[:k]).max(axis=1)  # dlogL/dlog c_k is the term's share of the loss
    return share


def condition_number(e: Evidence) -> float:
    """Of the Jacobian (free parameters, unit columns): how far directions in parameter space are from being
    told apart.
    """
    kept = e.jacobian_PN[e.free_P & ~e.prior_P]
    norm = np.linalg.norm(kept, axis=1, keepdims=True)
    if not len(kept) or (norm == 0).any():
        return float("inf") if len(kept) else 1.0
    return float(np.linalg.cond((kept / norm).T))


def _conditioning(e: Evidence) -> list[str]:
    number = condition_number(e)
    if number <= LARGEST_CONDITION:
        return []
    names = ["N" if name == SIZE.name else name for name in e.columns]
    how = f"vary {' and '.join(names)} apart" if len(names) > 1 else f"vary {names[0]} more"
    return [f"the condition number is {number:.1e}: the points cannot tell the terms apart; {how}"]


def _several_regimes(e: Evidence) -> list[str]:
    """Heavy tails, a trend that the form leaves in the residuals, or a column outside the form that explains
    them.
    """
    residual, n, out = e.residual_N, len(e.loss_N), []
    size = np.abs(residual)
    sigma = 1.4826 * float(np.median(size))
    far = size > np.maximum(TAIL_SIGMAS * sigma, TAIL_SIZE)
    if far.mean() > TAIL_SHARE and n >= 20:
        out.append(
            f"not one regime: {far.mean():.0%} of points lie more than {TAIL_SIGMAS:.0f} robust sigmas "
            f"(and {TAIL_SIZE:.0%} of their loss) off this law, the worst {size.max():.0%}"
        )
    share = _trend_share(e)
    if share > TREND_SHARE and _size(e) > TREND_SIZE:
        out.append(
            f"lack of fit: a quadratic in the logs of the inputs explains {share:.0%} of the residuals"
        )
    return [*out, *(_columns_outside(e) if _size(e) > COLUMN_SIZE else [])]


def remarks(e: Evidence) -> list[str]:
    """Worth saying, without making the law unhealthy."""
    outside = [] if _size(e) > COLUMN_SIZE else _columns_outside(e)
    return [*outside, *_unusual_ratio(e), *_digitised(e)]


def _unusual_ratio(e: Evidence) -> list[str]:
    """Rows far below or above the usual tokens per parameter, where they miss by far more than the others."""
    size, tokens = e.form.size_term, e.form.token_term
    if size is None or tokens is None:
        return []
    ratio_N = e.columns[tokens.column] / e.columns[size.column]
    short, long = USUAL_RATIO / FAR_RATIO, USUAL_RATIO * FAR_RATIO
    out = []
    if _worse(e, ratio_N < short):
        out.append(
            f"regime: {(ratio_N < short).sum()} of {len(ratio_N)} rows have fewer than {short:.2g} tokens per "
            f"parameter and miss by {_rms(e, ratio_N < short):.1%}, the others by {_rms(e, ratio_N >= short):.1%}: "
            "runs that short have not converged to the law; leave them out"
        )
    if _worse(e, ratio_N > long):
        out.append(
            f"regime: {(ratio_N > long).sum()} of {len(ratio_N)} rows have more than {long:.2g} tokens per parameter "
            f"and miss by {_rms(e, ratio_N > long):.1%}, the others by {_rms(e, ratio_N <= long):.1%}: "
            "fit each regime alone"
        )
    return out


def _worse(e: Evidence, some_N: np.ndarray) -> bool:
    if min(some_N.sum(), (~some_N).sum()) < FEWEST_ROWS:
        return False
    return _rms(e, some_N) > max(WORSE * _rms(e, ~some_N), TREND_SIZE)


def _rms(e: Evidence, some_N: np.ndarray) -> float:
    return float(np.sqrt((e.residual_N[some_N] ** 2).mean()))


def _digitised(e: Evidence) -> list[str]:
    """Losses of so few decimals that rounding them is much of what is left over: a table read off a figure, or cut."""
    for decimals in (1, 2, 3):
        if not np.allclose(e.loss_N, np.round(e.loss_N, decimals), rtol=0, atol=1e-9):
            continue
        rounding = 10.0**-decimals / np.sqrt(12) / float(np.median(e.loss_N))
        if _size(e) > 0 and rounding > ROUNDING * _size(e):
            return [
                f"digitised: the losses have {decimals} decimals, which alone is {rounding:.2%} of the loss "
                f"(the residuals: {_size(e):.2%}); give more digits"
            ]
        return []
    return []


def _size(e: Evidence) -> float:
    return float(np.sqrt((e.residual_N**2).mean()))


def _columns_outside(e: Evidence) -> list[str]:
    if len(e.loss_N) < 20 or _size(e) < 1e-3:
        return []
    ranks = {name: _rank_correlation(values, e.residual_N) for name, values in e.unused.items()}
    return [
        f"residuals follow the column {name} (rank correlation {rank:+.2f}), which the form leaves out"
        for name, rank in ranks.items()
        if abs(rank) > COLUMN_CORRELATION
    ]


def _trend_share(e: Evidence) -> float:
    """Adjusted R^2 of the residuals on all monomials up to degree two of the inputs' logs."""
    logs = [np.log(v) - np.log(v).mean() for v in e.columns.values() if _span(v) > SMALLEST_SPAN]
    basis = [
        np.ones(len(e.loss_N)),
        *logs,
        *(logs[i] * logs[j] for i in range(len(logs)) for j in range(i + 1)),
    ]
    n, p = len(e.loss_N), len(basis)
    if n < 2 * p + 4:
        return 0.0
    matrix = np.stack(basis, axis=1)
    left = e.residual_N - matrix @ np.linalg.lstsq(matrix, e.residual_N, rcond=None)[0]
    total = float(((e.residual_N - e.residual_N.mean()) ** 2).sum())
    return 1.0 - float((left**2).sum()) / total * (n - 1) / (n - p) if total > 0 else 0.0


def _rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's, with ties averaged."""
    a, b = (_ranks(v) for v in (x, y))
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2.0)[inverse]
    return ranks
