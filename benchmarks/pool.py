"""Error at the targets after a budget: escala's choice from a pool beside usual ones. Exit code 1 where one is better.

    nice -n 19 python benchmarks/pool.py ../shared/data/gemstones_cool_end.csv      # under 1 CPU-minute

Cost 6 N D. Targets: the top decile of N x D; a run with rows on both sides of the cut leaves the pool. Budgets of 1, 5
and 10 % of what all rows of the pool cost. Each design chooses until no row is affordable; all are fitted alike (the
fit of the pool: weak prior), and --plain also shows `fit_law` without a prior. Mean relative error of the targets'
loss, averaged over the seeds; a seed draws the random designs, the others choose the same rows under every seed.
D-optimal: the row that most raises the determinant of the Fisher information; V-optimal: that most lowers the mean
variance at the targets; both at the parameters that a fit to the rows so far gives, per cost ("/cost") and not.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from escala.contract.errors import LawError
from escala.laws import fit_law
from escala.laws.forms import get_form
from escala.planning import pool as pools
from escala.planning.pool import Pool

SHARES = (0.01, 0.05, 0.1)
NAMES = {"params_active_precise": "n_active", "final_loss": "loss_nats"}
RIDGE = 1e-8  # of an information that is not yet full

Rows = list[int]


def tables(path: Path, group: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The pool and the targets."""
    frame = pd.read_csv(path).rename(columns=NAMES)
    frame = frame.astype({"n_active": float, "tokens": float})  # N x D is beyond 64 bits as an integer
    product = frame.n_active * frame.tokens
    top = product >= product.quantile(0.9)
    return frame[~frame[group].isin(set(frame[group][top]))].reset_index(drop=True), frame[top]


def affordable(order: Rows, cost_K: np.ndarray, budget: float) -> Rows:
    """The rows of the order that still fit, one after the other."""
    out, left = Rows(), budget
    for k in order:
        if cost_K[k] <= left:
            out.append(int(k))
            left -= cost_K[k]
    return out


def optimal(pool: Pool, loss_K: np.ndarray, budget: float, by_targets: bool, per_cost: bool) -> Rows:
    """Greedy D- or V-optimal rows for the fit to the rows so far."""
    count, left, rows = len(pool.cost_K), budget, Rows()
    theta_P = pools.prior_mean(pool.form)
    while True:
        open_K = pool.cost_K <= left
        open_K[rows] = False
        if not open_K.any():
            return rows
        jacobian = pools._jacobian(pool.form, theta_P, pool.features)[1]
        new_PK, target_PT = jacobian[:, :count], jacobian[:, count:]
        fisher = new_PK[:, rows] @ new_PK[:, rows].T + RIDGE * np.eye(len(theta_P))
        solved_PK = np.linalg.solve(fisher, new_PK)
        leverage_K = np.einsum("pk,pk->k", new_PK, solved_PK)
        if by_targets:
            gain_K = ((target_PT.T @ solved_PK) ** 2).mean(axis=0) / (1 + leverage_K)
        else:
            gain_K = np.log1p(leverage_K)
        score_K = gain_K / pool.cost_K if per_cost else gain_K
        k = int(np.argmax(np.where(open_K, score_K, -np.inf)))
        rows.append(k)
        left -= pool.cost_K[k]
        theta_P = pools.estimate(pool, rows, loss_K[rows].tolist())


def designs(pool: Pool, loss_K: np.ndarray, budget: float) -> dict[str, Callable[[int], Rows]]:
    """Rows by design, of a seed."""
    cost_K = pool.cost_K

    def weighted(seed: int) -> Rows:
        return np.argsort(np.random.default_rng(seed).exponential(size=len(cost_K)) * cost_K).tolist()

    def bought(seed: int) -> Rows:
        return list(pools.explore_pool(pool, budget, lambda k: float(loss_K[k])).rows)

    found: dict[str, Callable[[int], Rows]] = {
        "escala": bought,
        "random": lambda s: affordable(
            np.random.default_rng(s).permutation(len(cost_K)).tolist(), cost_K, budget
        ),
        "cost-weighted random": lambda s: affordable(weighted(s), cost_K, budget),
        "cheapest": lambda s: affordable(np.argsort(cost_K, kind="stable").tolist(), cost_K, budget),
    }
    for name, by_targets in (("D-optimal", False), ("V-optimal", True)):
        for suffix, per_cost in (("", False), ("/cost", True)):
            found[name + suffix] = lambda s, v=by_targets, c=per_cost: optimal(pool, loss_K, budget, v, c)  # type: ignore[misc]
    return found


def plain_error(pool: pd.DataFrame, targets: pd.DataFrame, rows: Rows) -> float:
    """Of `fit_law` without a prior; NaN where it refuses so few rows."""
    try:
        law = fit_law(pool.iloc[rows][["n_active", "tokens", "loss_nats"]], bootstrap=0)
    except LawError:
        return np.nan
    columns = {name: targets[name].to_numpy() for name in ("n_active", "tokens")}
    return float(np.mean(np.abs(law.curve(columns) / targets.loss_nats.to_numpy() - 1)))


def main() -> int:
    """A line per budget and design."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--group", default="run_name", help="column of runs that the cut must not straddle")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--plain", action="store_true", help="also the fit without a prior")
    options = parser.parse_args()
    rows, targets = tables(options.table, options.group)
    inputs = [{"size": t.n_active.to_numpy(), "tokens": t.tokens.to_numpy()} for t in (rows, targets)]
    pool = Pool(get_form("nd"), *inputs, 6.0 * (rows.n_active * rows.tokens).to_numpy())
    loss_K, truth_T = rows.loss_nats.to_numpy(), targets.loss_nats.to_numpy()
    worse = 0
    for share in SHARES:
        errors = {}
        for name, design in designs(pool, loss_K, share * pool.cost_K.sum()).items():
            seeds = range(options.seeds if "random" in name else 1)
            chosen = [design(seed) for seed in seeds]
            found = [pools.fit_rows(pool, each, loss_K[each].tolist()).predictions_T for each in chosen]
            errors[name] = float(np.mean([np.mean(np.abs(p / truth_T - 1)) for p in found]))
            count = np.mean([len(each) for each in chosen])
            line = f"{share:4.0%}  {name:22} {errors[name]:.2%} at {count:.0f} rows"
            if options.plain:
                alone = [plain_error(rows, targets, each) for each in chosen]
                mean = np.mean([e for e in alone if np.isfinite(e)] or [np.nan])
                line += f"; without a prior {mean:.2%} ({int(np.isnan(alone).sum())} refused)"
            print(line, flush=True)
        worse += errors["escala"] > min(value for name, value in errors.items() if name != "escala")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
