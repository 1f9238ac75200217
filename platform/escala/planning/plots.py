"""What a front of plans looks like: loss against each cost that is known. Import lazily, as laws/plots.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from escala.contract.errors import LawError
from escala.planning.plan import Plan


def plot_front(plans: Sequence[Plan], path: Path, title: str) -> Path:
    """The Pareto front of `plans` as a PNG at `path`: loss with its 90 % predictive band, a panel per cost.

    Costs are of training and inference demand: FLOPs, and dollars and kWh where every plan knows them.
    Raises LawError for no plans.
    """
    if not plans:
        raise LawError("There are no plans to draw.", "Ask for the front at one budget or more.")
    plans = sorted(plans, key=lambda plan: plan.compute_flops + plan.inference_flops)
    costs: dict[str, list[float | None]] = {
        "C, FLOPs": [plan.compute_flops + plan.inference_flops for plan in plans],
        "cost, USD": [plan.usd for plan in plans],
        "energy, kWh": [plan.kwh for plan in plans],
    }
    known = {label: x for label, x in costs.items() if None not in x}
    figure = Figure(figsize=(1.6 + 4.8 * len(known), 4.2), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    loss = [plan.loss_nats for plan in plans]
    low, high = [p.low_nats or np.nan for p in plans], [p.high_nats or np.nan for p in plans]
    for axes, (label, x) in zip(panels, known.items(), strict=True):
        axes.set(xlabel=label, xscale="log")
        axes.plot(x, loss, "o-", ms=3, color="C0", label="the law at its best split")
        if plans[0].low_nats is not None:
            axes.fill_between(x, low, high, color="C0", alpha=0.2, label="90 % predictive interval")
    panels[0].set_ylabel("loss, nats per token")
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=110)
    return path
