"""Coverage and speed of the law fitter, against the project's floors. Exit code 1 where one is missed.

    python benchmarks/laws.py                       # 1000 repetitions per form, about 20 CPU-minutes
    python benchmarks/laws.py --repetitions 100 --form nd
    python benchmarks/laws.py --table gemstones.csv --map params_active_precise=n_active --map final_loss=loss_nats \
        --group run_name --hold-out "n_active>1.5e9"   # a public table alone; --keep "token_multiplier>=1" drops rows

Peer: the package `chinchilla` (PyPI) on the same 240 points and objective, in an environment of its own, which the
first run makes with pip under --peer-venv.

Coverage: synthetic sweeps over 1000x in compute with 0.5 % noise; the predictive interval at 10x the largest
compute is compared with a newly drawn run there, and each parameter's interval with the truth. Speed: CPU
seconds of this process on one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from escala.laws import Law, fit_law

TRUTH = {
    "L_inf": 1.8172,
    "a": 482.01,
    "alpha": 0.3478,
    "b": 2085.43,
    "beta": 0.3658,
    "c": 5.0,
    "zeta": 0.5,
    "rho": 0.47,
}
NOISE = 0.005  # of the loss, lognormal
LEVEL = 0.9


def loss(form: str, table: pd.DataFrame) -> np.ndarray:
    """The true law: Besiroglu et al. (2024), equation 4, with a context or an expert term of our own."""
    size = table["n_active"].to_numpy()
    if form == "moe":
        size = size * (table["n_total"] / table["n_active"]).to_numpy() ** TRUTH["rho"]
    out = (
        TRUTH["L_inf"]
        + TRUTH["a"] * size ** -TRUTH["alpha"]
        + TRUTH["b"] * table["tokens"].to_numpy() ** -TRUTH["beta"]
    )
    if form == "ndt":
        out = out + TRUTH["c"] * table["context_tokens"].to_numpy() ** -TRUTH["zeta"]
    return np.asarray(out)


def sweep(form: str, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """n runs of 1e17 to 1e20 FLOPs, 20 tokens per parameter within a factor of 5.6."""
    compute, ratio = 10 ** rng.uniform(17, 20, n), 20 * 10 ** rng.uniform(-0.75, 0.75, n)
    table = pd.DataFrame({"n_active": np.sqrt(compute / 6 / ratio)})
    table["tokens"] = compute / 6 / table["n_active"]
    table["n_total"] = table["n_active"] * (rng.choice([1.0, 2, 4, 8, 16, 32], n) if form == "moe" else 1.0)
    table["context_tokens"] = 2.0 ** rng.integers(7, 13, n)
    table["loss_nats"] = loss(form, table) * np.exp(NOISE * rng.standard_normal(n))
    return table


def coverage(form: str, n: int, repetitions: int, bootstrap: int) -> dict[str, float]:
    """Share of repetitions whose interval holds the truth: `predict`, and each parameter."""
    hits: dict[str, list[bool]] = {}
    for repetition in range(repetitions):
        rng = np.random.default_rng([20220329, repetition])
        table = sweep(form, n, rng)
        law = fit_law(table, form, bootstrap=bootstrap, seed=repetition)
        budget = 10 * float((6 * table["n_active"] * table["tokens"]).max())
        size = np.sqrt(budget / 6 / 20)
        point = {"n_active": size, "tokens": budget / 6 / size, "n_total": size * (8 if form == "moe" else 1)}
        point["context_tokens"] = 1024.0
        obtained = loss(form, pd.DataFrame([point]))[0] * np.exp(NOISE * rng.standard_normal())
        answer = law.predict(LEVEL, **point)
        hits.setdefault("predict", []).append(bool(answer.low_nats <= obtained <= answer.high_nats))
        for name, (low, high) in law.intervals(LEVEL).items():
            hits.setdefault(name, []).append(low <= TRUTH[name] <= high)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def timings() -> dict[str, float]:
    """CPU seconds: a fit of 240 points with its safety starts, its rolling backtests, 1000 bootstraps beside it, and a
    query (best of several).
    """
    table = sweep("nd", 240, np.random.default_rng(1))
    fit_law(table, bootstrap=10)  # imports

    def best(work: object, repeats: int = 5) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            work()  # type: ignore[operator]
            seconds.append(time.process_time() - start)
        return min(seconds)

    fit = best(lambda: fit_law(table, bootstrap=0))
    law: Law = fit_law(table)
    full = best(lambda: fit_law(table), 3)
    query = best(lambda: [law.predict(n_active=1e9, tokens=2e10) for _ in range(200)]) / 200
    few = best(lambda: fit_law(table, bootstrap=20), 3)  # the same backtests, hardly a bootstrap
    return {
        "fit_seconds": fit,
        "calibration_seconds": few - fit,
        "bootstrap_seconds": full - few,
        "query_seconds": query,
    }


PEER = "chinchilla==0.2.0"
PEER_CODE = """
import json, sys, tempfile, time
from functools import partial
import numpy as np
from chinchilla import Chinchilla
from chinchilla._metrics import log_huber
rows = json.load(sys.stdin)
grid = dict(E=np.linspace(1.1, 2.1, 3), a=np.linspace(2, 8, 3), b=np.linspace(2, 10, 3),
            alpha=np.linspace(0.2, 0.6, 3), beta=np.linspace(0.2, 0.6, 3))
cc = Chinchilla(tempfile.mkdtemp(), param_grid=grid, loss_fn=partial(log_huber, delta=1e-3), log_level=40)
for n, d, loss in rows:
    cc.database.append(N=n, D=d, C=6 * n * d, loss=loss)
cc.visualizer.optim = lambda *a, **k: None  # its plot is not what is timed
began = time.process_time()
cc.fit(parallel=False)
print(json.dumps({"seconds": time.process_time() - began, **cc.params}))
"""


def against_peer(venv: Path) -> bool:
    """Our fit and theirs of the same points: CPU seconds, and the objective that both claim to minimise."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER], check=True)
    table = sweep("nd", 240, np.random.default_rng(1))
    fit_law(table, bootstrap=0)
    began = time.process_time()
    law = fit_law(table, bootstrap=0)
    seconds = time.process_time() - began
    rows = table[["n_active", "tokens", "loss_nats"]].round(12).to_numpy().tolist()
    done = subprocess.run(
        [str(python), "-c", PEER_CODE], input=json.dumps(rows), capture_output=True, text=True, check=True
    )
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    curve = (
        theirs["E"]
        + theirs["A"] * table["n_active"] ** -theirs["alpha"]
        + theirs["B"] * table["tokens"] ** -theirs["beta"]
    )
    error = np.abs(np.log(table["loss_nats"]) - np.log(curve)).to_numpy()
    huber = float(np.where(error <= 1e-3, error**2 / 2, 1e-3 * (error - 5e-4)).sum())
    print(f"{PEER}: 243 starts, {theirs['seconds']:.2f} s of CPU, objective {huber:.9g}")
    print(
        f"escala: {1e3 * seconds:.1f} ms ({theirs['seconds'] / seconds:.0f}x), objective {law.objective_value:.9g}"
    )
    return seconds <= theirs["seconds"] and law.objective_value <= huber * (1 + 1e-8)


def public_table(file: Path, rename: dict[str, str], group: str | None, keep: str | None, held: str) -> bool:
    """The largest scale of a measured table held out: how many 90 % intervals hold there, their mean width, the error.

    Floors: the law is healthy, 85 % inside, and the mean width at most four times the mean error + 2 %.
    """
    table = pd.read_csv(file).rename(columns=rename)
    table = table.query(keep) if keep else table
    beyond = table.eval(held).to_numpy(bool)
    began = time.process_time()
    law = fit_law(table[~beyond], group=group)
    seconds = time.process_time() - began
    inside, widths, errors = [], [], []
    for _, row in table[beyond].iterrows():
        answer = law.predict(LEVEL, **{name: float(row[name]) for name in law.inputs})
        inside.append(bool(answer.low_nats <= row["loss_nats"] <= answer.high_nats))
        widths.append((answer.high_nats - answer.low_nats) / answer.loss_nats)
        errors.append(abs(answer.loss_nats / row["loss_nats"] - 1))
    width, error, limit = np.mean(widths), np.mean(errors), 4 * np.mean(errors) + 0.02
    rolling = law.rolling
    past = (
        "none"
        if rolling is None
        else f"{rolling.coverage:.0%} of {rolling.predictions}, {rolling.points} points"
    )
    print(
        f"{file.name}: {len(law.points)} rows, {len(inside)} held out: {np.mean(inside):.0%} inside "
        f"(floor {FLOOR_INSIDE:.0%}), mean width {width:.2%} (at most {limit:.2%}), mean error {error:.2%}; "
        f"{'healthy' if law.healthy else 'NOT healthy'}, backtest {past}; {seconds:.2f} s"
    )
    for finding in law.findings:
        print(f"  finding   {finding}")
    return law.healthy and float(np.mean(inside)) >= FLOOR_INSIDE and bool(width <= limit)


FLOOR_INSIDE = 0.85
FLOORS = {"fit_seconds": 0.050, "calibration_seconds": 5.0, "bootstrap_seconds": 1.5, "query_seconds": 0.001}


def main() -> int:
    """Print every number beside its floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--bootstrap", type=int, default=300)
    parser.add_argument("--form", choices=["nd", "ndt", "moe"], action="append")
    venv = Path.home() / ".cache" / "escala-bench" / "chinchilla"
    parser.add_argument(
        "--peer-venv", type=Path, default=venv, help="where the peer is, or is to be, installed"
    )
    parser.add_argument("--table", type=Path, help="a public table (CSV) instead of everything else")
    parser.add_argument("--map", action="append", default=[], metavar="COLUMN=NAME")
    parser.add_argument("--group")
    parser.add_argument("--keep", metavar="EXPRESSION", help="rows of the table that count (DataFrame.query)")
    parser.add_argument("--hold-out", metavar="EXPRESSION", default="n_active > n_active.quantile(0.8)")
    options = parser.parse_args()
    if options.table:
        rename = dict(each.split("=", 1) for each in options.map)
        return 0 if public_table(options.table, rename, options.group, options.keep, options.hold_out) else 1
    missed = int(not against_peer(options.peer_venv))
    for name, seconds in timings().items():
        missed += seconds > FLOORS[name]
        print(f"{name:20} {1e3 * seconds:10.3f} ms   floor {1e3 * FLOORS[name]:.0f} ms")
    for form in options.form or ["nd", "ndt", "moe"]:
        for name, share in coverage(form, options.points, options.repetitions, options.bootstrap).items():
            low, high = (0.85, 0.95) if name == "predict" else (0.80, 0.97)
            missed += not low <= share <= high
            print(f"{form:4} {name:8} coverage {share:.3f}   floor {low:.2f} to {high:.2f}", flush=True)
    print("all floors hold" if not missed else f"{missed} floors missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
