"""What a law looks like: loss along each input, residuals, IsoFLOP curves, allocation. Matplotlib without
pyplot: no display, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from escala.contract.errors import LawError
from escala.laws.forms import known_inputs
from escala.laws.health import SMALLEST_SPAN
from escala.laws.law import Allocation, Law
from escala.laws.powers import Floats

STEPS = 40  # points of a curve
BEYOND = 10.0  # curves go on to ten times the largest value measured


def write_plots(law: Law, directory: Path) -> list[Path]:
    """Every figure of `figures(law)` as a PNG in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(law).items():
        paths.append(directory / f"{name}.png")
        FigureCanvasAgg(figure)
        figure.savefig(paths[-1], dpi=110)
    return paths


def figures(law: Law) -> dict[str, Figure]:
    """`loss_against_COLUMN` for each input that varies, `residuals`, and where the law splits a budget
    `isoflop` and `allocation`.
    """
    columns = _columns(law)
    loss_N = law.points["loss_nats"].to_numpy(np.float64)
    middle = {name: float(np.exp(np.log(values).mean())) for name, values in columns.items()}
    out = {
        f"loss_against_{name}": _along(law, name, columns, loss_N, middle)
        for name, values in columns.items()
        if values.max() / values.min() >= SMALLEST_SPAN
    }
    out["residuals"] = _residuals(law, columns, loss_N)
    best = _frontier(law, middle)
    if best:
        out["loss_against_compute"] = _compute(law, columns, loss_N, best)
        out["isoflop"] = _isoflop(law, columns, loss_N, middle)
        out["allocation"] = _allocation(best)
    return out


def _columns(law: Law) -> dict[str, Floats]:
    return {name: law.points[name].to_numpy(np.float64) for name in law.inputs}


def _new(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log")
    return figure, axes


def _along(
    law: Law, name: str, columns: Mapping[str, Floats], loss_N: Floats, middle: Mapping[str, float]
) -> Figure:
    """The law along one input, the others at their geometric mean. Each point is moved there along the law, so
    its distance from the curve is its residual.
    """
    label = known_inputs()[name].label
    figure, axes = _new(f"Loss against {label}", label, "loss, nats per token")
    values = columns[name]
    x = np.geomspace(values.min(), values.max() * BEYOND, STEPS)
    answers = [law.predict(0.9, **{**middle, name: float(value)}) for value in x]
    axes.plot(x, [a.loss_nats for a in answers], color="C0", label=f"{law.form.formula}, others at the mean")
    if answers[0].low_nats is not None:
        low, high = [a.low_nats or np.nan for a in answers], [a.high_nats or np.nan for a in answers]
        axes.fill_between(x, low, high, color="C0", alpha=0.2, label="90 % predictive interval")
    there = {key: np.full(len(values), middle[key]) for key in columns} | {name: values}
    axes.plot(values, loss_N / law.curve(columns) * law.curve(there), ".", color="C1", label="runs, moved")
    axes.axvline(values.max(), color="grey", lw=0.8, ls=":", label="largest measured")
    axes.legend(fontsize=8)
    return figure


def _residuals(law: Law, columns: Mapping[str, Floats], loss_N: Floats) -> Figure:
    figure, axes = _new("Residuals", "predicted loss, nats per token", "loss / predicted - 1, %")
    fitted_N = law.curve(columns)
    axes.set_xscale("linear")
    axes.plot(fitted_N, 100 * (loss_N / fitted_N - 1), ".", color="C1")
    axes.axhline(0, color="grey", lw=0.8)
    return figure


def _frontier(law: Law, middle: Mapping[str, float]) -> list[Allocation]:
    """The best split at budgets over the data and ten times beyond; none where the law has no optimum."""
    if "compute_flops" not in law.ranges:
        return []
    low, high = law.ranges["compute_flops"]
    context = middle.get("context_tokens")
    ratio = middle["n_total"] / middle["n_active"] if law.form.mixed else None
    try:
        return [
            law.optimum(float(c), context_tokens=context, n_total_over_active=ratio)
            for c in np.geomspace(low, high * BEYOND, STEPS // 2)
        ]
    except LawError:  # a form without a split, or a term that is zero: nothing to draw
        return []


def _flops(law: Law, columns: Mapping[str, Floats]) -> Floats:
    """6 N D of each point: the compute that `optimum` divides."""
    flops: Floats = 6.0 * columns[_size(law)] * columns["tokens"]
    return flops


def _size(law: Law) -> str:
    """The input that is N of 6 N D."""
    return law.form.size_input(law.size) or law.size


def _compute(law: Law, columns: Mapping[str, Floats], loss_N: Floats, best: list[Allocation]) -> Figure:
    figure, axes = _new("Loss against compute", "C = 6 N D, FLOPs", "loss, nats per token")
    axes.plot(_flops(law, columns), loss_N, ".", color="C1", label="runs")
    x = [a.compute_flops for a in best]
    axes.plot(x, [a.loss_nats for a in best], color="C0", label="the law at its best split")
    if best[0].low_nats is not None:
        low, high = [a.low_nats or np.nan for a in best], [a.high_nats or np.nan for a in best]
        axes.fill_between(x, low, high, color="C0", alpha=0.2, label="90 % predictive interval")
    axes.legend(fontsize=8)
    return figure


def _isoflop(law: Law, columns: Mapping[str, Floats], loss_N: Floats, middle: Mapping[str, float]) -> Figure:
    """The law's loss against N at five budgets, and the runs in the colour of their compute."""
    size = _size(law)
    figure, axes = _new("IsoFLOP curves of the law", known_inputs()[size].label, "loss, nats per token")
    flops_N = _flops(law, columns)
    budgets = np.geomspace(flops_N.min(), flops_N.max() * BEYOND, 5)
    low, high = np.log10(budgets[0]), np.log10(budgets[-1])
    ratio = middle["n_total"] / middle["n_active"] if law.form.mixed else None
    for budget in budgets:
        best = law.optimum(
            float(budget), context_tokens=middle.get("context_tokens"), n_total_over_active=ratio
        )
        x = np.geomspace(best.n_active / 30, best.n_active * 30, STEPS)
        at = {name: np.full(STEPS, value) for name, value in middle.items()}
        at |= {size: x, "tokens": budget / 6.0 / x} | ({"n_total": x * ratio} if ratio else {})
        colour = _colour(float(budget), low, high)
        axes.plot(x, law.curve(at), color=colour, label=f"C = {budget:.2g}")
        axes.plot(best.n_active, best.loss_nats, "o", color=colour)
    for x_n, y_n, c_n in zip(columns[size], loss_N, flops_N, strict=True):
        axes.plot(x_n, y_n, ".", color=_colour(float(c_n), low, high))
    floor = law.parameters["L_inf"]
    axes.set_ylim(top=max(float(loss_N.max()) * 1.1, floor * 1.1))
    axes.legend(fontsize=8)
    return figure


def _colour(budget: float, low: float, high: float) -> tuple[float, float, float]:
    """From blue (small) to red (large)."""
    share = min(max((np.log10(budget) - low) / max(high - low, 1e-9), 0.0), 1.0)
    return (float(share), 0.2, float(1 - share))


def _allocation(best: list[Allocation]) -> Figure:
    figure, axes = _new("Best split of a budget", "C, FLOPs", "N, and D in tokens")
    axes.set_yscale("log")
    x = [a.compute_flops for a in best]
    axes.plot(x, [a.n_active for a in best], color="C0", label="N active")
    if best[0].n_active_low is not None:
        low, high = [a.n_active_low or np.nan for a in best], [a.n_active_high or np.nan for a in best]
        axes.fill_between(x, low, high, color="C0", alpha=0.2, label="90 % interval of N")
    axes.plot(x, [a.tokens for a in best], color="C2", label="D")
    axes.legend(fontsize=8)
    return figure
