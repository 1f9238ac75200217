"""What PPO learns, through the client on this home's cluster: a known optimum, and what the KL coefficient is for.

optimum: say nothing but the letter e (reward: its share of the text, optimum 1); a random model of two layers, 128
responses an iteration; GAE, GRPO and RLOO, three seeds each. Floor: 0.9 within 60 iterations, in every run.

quantised: the same by GAE with responses drawn in fp32, INT8 and INT4, five seeds each, importance weights capped at 2.
Floors: 0.9 within 60 iterations in every run, and the median of the iterations at most 1.2 times that of fp32.

control: a reward model of few pairs by real raters is easily fooled. From a policy that was taught the positive words,
the same run with and without a KL coefficient. Floors, without it: KL at the end three times as much, and the held-out
raters' score (`workloads.data.raters.held_out_score`) below where it began. With it, it must not fall.

    python benchmarks/rlhf.py [--only optimum | quantised | control] [--precisions fp32 int8 int4]

About 45 minutes of two cores. Run ids are printed; exit code 1 where a floor is missed.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from escala import Escala
from escala.cli.demo_rlhf import GOLD, PAIRS, PRETRAINING
from escala.views.run_records import RunView
from workloads.data import raters
from workloads.data.dialogues import write_lines
from workloads.data.tokenizer import train_tokenizer

FLOOR, ITERATIONS, SEEDS = 0.9, 60, 3
BONUS = 0.05  # of entropy, where advantages have unit variance; rloo's have a tenth of it
KINDS: dict[str, dict[str, Any]] = {
    "rloo": {"policy_loss": {"entropy_coefficient": BONUS / 10}},
    "grpo": {"policy_loss": {"entropy_coefficient": BONUS}},
    "gae": {"policy_loss": {"entropy_coefficient": BONUS}, "critic": {"learning_rate": 1e-2}},
}
PRECISIONS, PRECISION_SEEDS, MOST_RATIO, CAP = ("fp32", "int8", "int4"), 5, 1.2, 2.0
PROMPTS = ["def a", "for x in", "class", "import", "return", "self.", "if not", "else:"]
COEFFICIENT, KL_RATIO = 0.2, 3.0
FEW, POSITIVE = 1_500, 1.0  # of the scale from -4 to 4


def main() -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["optimum", "quantised", "control"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="escala-rlhf-") as name:
        directory = Path(name)
        parts: dict[str, Callable[[], bool]] = {
            "optimum": lambda: optimum(directory),
            "quantised": lambda: quantised(directory, options.precisions),
            "control": lambda: control(directory),
        }
        good = [part() for name, part in parts.items() if options.only in (None, name)]
    return 0 if all(good) else 1


def share_of_e(prompts: list[str], responses: list[str]) -> list[float]:
    """1 where nothing but the letter e is said."""
    return [text.count("e") / max(1, len(text)) for text in responses]


def optimum(directory: Path) -> bool:
    """All estimators on all seeds; whether every run comes near the optimum."""
    write_letter_task(directory)
    good = True
    for kind, own in KINDS.items():
        for seed in range(SEEDS):
            run = ended("ppo", letter_spec(directory, kind, seed) | own, f"{kind}-{seed}")
            good &= reached(run, f"{kind}, seed {seed}") is not None
    return good


def write_letter_task(directory: Path) -> None:
    """The tokenizer and the prompts of the letter e."""
    train_tokenizer([inspect.getsource(argparse)], 300).save(str(directory / "tokenizer.json"))
    write_lines(directory / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])


def reached(run: RunView, what: str) -> int | None:
    """The iteration that comes near the optimum, printed; None: none does."""
    rewards = Escala().history(run.run_id, "reward")
    first = next((step for step, reward in rewards if reward >= FLOOR), None)
    print(
        f"{what}: {FLOOR} of the optimum after {first} of {ITERATIONS} iterations (last {rewards[-1][1]:.2f}); run "
        f"{run.run_id}, {run.wall_seconds:.0f} s",
        flush=True,
    )
    return first


def quantised(directory: Path, precisions: Sequence[str]) -> bool:
    """All seeds in every precision at once; whether every run comes near the optimum, and as soon as in fp32."""
    write_letter_task(directory)
    own = {**KINDS["gae"], "policy_loss": {**KINDS["gae"]["policy_loss"], "importance_cap": CAP}}
    jobs = {}
    for seed in range(PRECISION_SEEDS):
        for precision in precisions:
            spec = letter_spec(directory, "gae", seed) | own
            spec["rollouts"] = {**spec["rollouts"], "precision": precision}
            jobs[precision, seed] = submitted("ppo", spec, f"{precision}-{seed}")
    iterations: dict[str, list[float]] = {precision: [] for precision in precisions}
    for (precision, seed), job in jobs.items():
        run = waited_for(job, f"{precision}-{seed}")
        gaps = [Escala().history(run.run_id, name) for name in ("engine_gap_nats", "engine_gap_max_nats")]
        first = reached(run, f"rollouts in {precision}, seed {seed}")
        print(
            f"  engine's gap: mean {mean_of(gaps[0]):.2g} nats a token, at most {max(v for _, v in gaps[1]):.2g}"
        )
        iterations[precision].append(float("inf") if first is None else first)
    medians = {precision: statistics.median(found) for precision, found in iterations.items()}
    good = all(max(found) <= ITERATIONS for found in iterations.values())
    for precision, median in medians.items():
        ratio = median / medians.get("fp32", median)
        print(
            f"{precision}: median {median:g} iterations, {ratio:.2f} of fp32's (at most {MOST_RATIO})",
            flush=True,
        )
        good &= ratio <= MOST_RATIO
    return good


def mean_of(points: Sequence[tuple[int, float]]) -> float:
    """Of a metric's history."""
    return statistics.fmean(value for _, value in points)


def letter_spec(directory: Path, kind: str, seed: int) -> dict[str, Any]:
    """The same for all estimators."""
    return {
        "model": {"vocab_size": 300, "n_layers": 2, "d_model": 32, "n_heads": 2, "max_context_tokens": 32},
        "tokenizer": str(directory / "tokenizer.json"),
        "prompts": str(directory / "prompts.jsonl"),
        "rewards": [{"kind": "function", "function": "benchmarks.rlhf:share_of_e"}],
        "sampling": {"max_response_tokens": 8},
        "rollouts": {"replica_cpus": 0.5},
        "batch": {
            "prompts": 8,
            "responses_per_prompt": 16,
            "epochs": 2,
            "minibatches": 4,
            "micro_batch_tokens": 512,
        },
        "advantage": {"kind": kind, "bootstrap": False},
        "kl": {"coefficient": 0.0, "limit_nats_per_token": 20},
        "training": {"steps": ITERATIONS, "seed": seed, "optimizer": {"learning_rate": 5e-3}},
        "resources": {"workers": 1, "cpus_per_worker": 0.5},
    }


def control(directory: Path) -> bool:
    """A policy, a reward model, and PPO with and without a KL coefficient."""
    raters.make(directory, seed=0, pairs=PAIRS)
    entries = raters.load_entries()
    means = dict(zip(entries.texts, entries.ratings[:, raters.TRAIN_RATERS].mean(1), strict=True))
    for side, held_out in (("train", False), ("held_out", True)):
        rows = raters.answers(entries, held_out, 0)
        named = {raters.RESPONSE.format(text): mean for text, mean in means.items()}
        write_lines(
            directory / f"good_{side}.jsonl", [row for row in rows if named[row["completion"]] >= POSITIVE]
        )
    lines = (directory / "train.jsonl").read_text().splitlines(keepends=True)
    (directory / "few.jsonl").write_text("".join(lines[:FEW]))
    base = ended("pretrain", PRETRAINING, "base").job_id
    policy = ended("sft", tuned(base, directory, "good_train", "good_held_out", 600, 8), "policy").job_id
    reward = ended("reward", tuned(base, directory, "few", "other_raters", 60, 64), "reward").job_id
    free, held = (
        ended("ppo", reinforced(directory, policy, reward, coefficient), f"kl-{coefficient}")
        for coefficient in (0.0, COEFFICIENT)
    )
    (kl_free, gold_free), (kl_held, gold_held) = (told(run) for run in (free, held))
    good = kl_free >= KL_RATIO * kl_held and gold_free[1] < gold_free[0] and gold_held[1] >= gold_held[0]
    print(f"KL {kl_free / kl_held:.1f} times as much without the coefficient (floor {KL_RATIO:g}): {good}")
    return good


def told(run: RunView) -> tuple[float, tuple[float, float]]:
    """(KL at the end, held-out raters' score at the beginning and at the end), printed."""
    found = {}
    for name in ("reward_served", "reward_held_out_score", "kl_nats"):
        points = Escala().history(run.run_id, name)
        found[name] = (points[0][1], points[-1][1])
    print(
        f"{run.name}: reward model {found['reward_served'][0]:.2f} to {found['reward_served'][1]:.2f}, held-out raters "
        f"{found['reward_held_out_score'][0]:.2f} to {found['reward_held_out_score'][1]:.2f}, KL "
        f"{found['kl_nats'][1]:.2f} nats; says {Escala().samples(run.run_id)[-1].response!r}; run {run.run_id}",
        flush=True,
    )
    return found["kl_nats"][1], found["reward_held_out_score"]


def tuned(base: str, directory: Path, train: str, held_out: str, steps: int, batch: int) -> dict[str, Any]:
    """Of SFT and the reward model."""
    data = {"train": str(directory / f"{train}.jsonl"), "held_out": str(directory / f"{held_out}.jsonl")}
    training = {"steps": steps, "batch_sequences": batch, "optimizer": {"learning_rate": 1e-3}}
    return {"start": {"job": base}, "data": data, "training": training}


def reinforced(directory: Path, policy: str, reward: str, coefficient: float) -> dict[str, Any]:
    """PPO against the reward model, the held-out raters looking on."""
    return {
        "start": {"job": policy},
        "prompts": str(directory / "prompts.jsonl"),
        "rewards": [{"kind": "model", "job": reward}, {"kind": "function", "function": GOLD, "weight": 0}],
        "critic": {"start": {"job": reward}, "learning_rate": 1e-3},
        "advantage": {"bootstrap": False},
        "sampling": {"max_response_tokens": 12},
        "batch": {"prompts": 64, "epochs": 2, "minibatches": 2},
        "kl": {"coefficient": coefficient, "limit_nats_per_token": 50},
        "training": {"steps": 40, "optimizer": {"learning_rate": 3e-4}},
        "rollouts": {"replica_cpus": 0.5},
        "resources": {"workers": 1, "cpus_per_worker": 0.5},
    }


def ended(workload: str, spec: dict[str, Any], name: str) -> RunView:
    """The run of a job, submitted and waited for. Exits where it fails."""
    return waited_for(submitted(workload, spec, name), name)


def submitted(workload: str, spec: dict[str, Any], name: str) -> str:
    """The id of a job."""
    return Escala().submit(workload, base=spec, options={"name": name}).id


def waited_for(job: str, name: str) -> RunView:
    """The run of a job that has ended. Exits where it failed."""
    for state in Escala().watch(job):
        last = state.job
    if last.state != "succeeded":
        raise SystemExit(f"{name} ({job}) {last.state}: {last.message}; escala logs {job}")
    return Escala().finished_run(job)


if __name__ == "__main__":
    sys.exit(main())
