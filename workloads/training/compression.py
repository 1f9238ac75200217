"""What the worker of `escala compress` does: measure, choose, write (docs/theory E.2 to E.6).

Dimensions: N sequences, T context, G groups, C candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from torch import Tensor

from escala.contract.errors import SpecError
from escala.contract.records import AttemptSpec
from escala.schema import CompressConfig
from escala.schema.compression import MatrixChoice
from escala.storage.checkpoints import open_checkpoints
from workloads.model.compression.budget import Assignment, BudgetSearch, LossIncrease
from workloads.model.compression.cost import ServedCost
from workloads.model.compression.groups import Candidate, MatrixGroup, candidates, groups
from workloads.model.compression.layers import Compressed, matrices
from workloads.model.compression.report import COLUMNS, TensorTable, figure
from workloads.model.compression.saved import save_compressed
from workloads.model.compression.sensitivity import CompressedLoss, Shelf, counted_choices, untied
from workloads.model.transformer import Transformer
from workloads.training.energy import rates
from workloads.training.report import Reporter

STEP = 1
"""Of the checkpoint that is written: a compressed model has made no steps."""
BUDGET_COLUMNS = [
    "budget_nats",
    "additive_nats",
    "predicted_nats",
    "measured_nats",
    "check_nats",
    "bytes",
    "joules_per_token",
    "uniform",
    "uniform_bytes",
    "bytes_over_uniform",
    "bytes_over_any_uniform",
    "measurements",
]
"""`uniform`: the cheapest width everywhere that keeps the budget, of the asked group and method; `any_uniform`: of all
that were measured."""


@dataclass(frozen=True)
class Uniform:
    """All matrices at one width, the output product at 8 bits at least."""

    candidate: Candidate
    method: str
    increase: LossIncrease
    bytes: int
    smaller: float  # fp32 over stored, of the blocks' matrices


class Compression:
    """One model's. Results go to the reporter, and to the facts of the attempt."""

    def __init__(
        self,
        config: CompressConfig,
        spec: AttemptSpec,
        model: Transformer,
        tokens_NT1: Tensor,
        reporter: Reporter,
        fingerprints: Mapping[str, str],
    ) -> None:
        self.config, self.spec, self.reporter, self.fingerprints = config, spec, reporter, dict(fingerprints)
        self.model = untied(model)
        sequences = max(1, min(len(tokens_NT1) - 1, config.tokens // config.context))
        self.loss = CompressedLoss(self.model, tokens_NT1[:sequences])
        self.check = CompressedLoss(self.model, tokens_NT1[sequences:])
        self.weights = matrices(self.model)
        self.groups = groups(self.weights, config.keep)
        self.candidates = candidates(config)
        self.shelf = Shelf(self.weights)
        self.cost = ServedCost(self.model.config.moe, rates(spec))
        self.measures: dict[str, float] = {}

    def run(self) -> None:
        """All of it. Raises ToleranceNotMet where a budget cannot be kept, SpecError, CheckpointError."""
        with counted_choices(self.model) as counts:
            self.whole = LossIncrease(self.loss.loss(), self.check.loss())
        tokens = self.loss.targets_NT.numel(), self.check.targets_NT.numel()
        self._say(
            f"held-out loss {self.whole.nats:.4f} on {tokens[0]} tokens, {self.whole.check_nats:.4f} on "
            f"{tokens[1]} others"
        )
        table = self._tensors(counts)
        uniforms = self._uniforms()
        losses_GC: list[list[float]] = []
        found: list[tuple[float, Assignment]] = []
        if self.config.loss_budgets:
            losses_GC = self.loss.increases(self.groups, self.candidates, self._store, self._say)
            self._sensitivities(losses_GC)
            found = self._budgets(losses_GC, uniforms)
        self._plot(table, losses_GC, found)
        if found:
            self._write(*found[0])
        self.reporter.facts(
            measures=self.measures,
            initial_held_out_loss_nats=self.whole.nats,
            context_tokens=self.config.context,
        )

    def _tensors(self, counts: Sequence[Tensor]) -> TensorTable:
        """The spectrum of each matrix; of a mixture's experts the entropy that a token meets, too."""
        table = TensorTable.of(self.weights)
        self.reporter.table("tensors.json", COLUMNS, table.rows())
        values = {name: [float(v) for v in s.singular_values] for name, s in table.spectra.items()}
        self.reporter.text("singular_values.json", json.dumps(values))
        found = table.metrics()
        layers = [n for n, block in enumerate(self.model.layers) if hasattr(block.feed_forward, "experts")]
        active = table.active_entropies(dict(zip(layers, counts, strict=True)))
        if active:
            found["active_entropy_bits"] = sum(active.values()) / len(active)
            self.reporter.text("active_entropy.json", json.dumps(active))
        self._measured(found)
        return table

    def _uniforms(self) -> list[Uniform]:
        """Every width that can be served, everywhere; of 4 bits both methods."""
        found = []
        other = "round" if self.config.method == "hqq" else "hqq"
        for candidate in self.candidates:
            if candidate.rank_share is not None or candidate.bits not in (4, 8, 16):
                continue
            methods = [self.config.method, other] if candidate.bits == 4 else [self.config.method]
            found += [self._uniform(candidate, method) for method in methods]
        columns = ["bits", "method", "loss_increase_nats", "check_nats", "bytes", "times_smaller"]
        rows = [
            [u.candidate.label, u.method, u.increase.nats, u.increase.check_nats, u.bytes, u.smaller]
            for u in found
        ]
        self.reporter.table("uniform.json", columns, rows)
        return found

    def _uniform(self, candidate: Candidate, method: str) -> Uniform:
        config = self.config.model_copy(update={"method": method})
        stored: dict[str, Compressed] = {}
        for group in self.groups:
            served = candidate if candidate.is_served(group) else Candidate(8)
            stored |= {n: self.shelf(n, served.choice(self._shape(n), config)) for n in group.matrices}
        blocks = [name for name in stored if name.startswith("blocks.")]
        whole = sum(4 * self.weights[name].numel() for name in blocks)
        smaller = whole / sum(stored[name].nbytes for name in blocks)
        size = sum(matrix.nbytes for matrix in stored.values())
        uniform = Uniform(candidate, method, self._increase(stored), size, smaller)
        key = f"uniform_{candidate.label.replace(' ', '_')}_{method}"
        self._measured(
            {
                f"{key}_nats": uniform.increase.nats,
                f"{key}_check_nats": uniform.increase.check_nats,
                f"{key}_bytes": uniform.bytes,
            }
        )
        self._say(f"all matrices at {candidate.label} bits, {method}: {uniform}")
        return uniform

    def _sensitivities(self, losses_GC: list[list[float]]) -> None:
        columns = ["group", *(candidate.label for candidate in self.candidates)]
        rows = [[group.name, *losses] for group, losses in zip(self.groups, losses_GC, strict=True)]
        self.reporter.table("sensitivities.json", columns, rows)

    def _budgets(
        self, losses_GC: list[list[float]], uniforms: Sequence[Uniform]
    ) -> list[tuple[float, Assignment]]:
        """The cheapest assignment within each budget, the smallest budget first."""
        served = [[c.is_served(g) for c in self.candidates] for g in self.groups]
        cost_GC = [
            [self._cost(g, c) if ok else float("inf") for c, ok in zip(self.candidates, row, strict=True)]
            for g, row in zip(self.groups, served, strict=True)
        ]
        search = BudgetSearch(cost_GC, losses_GC, self._tried, self._known(uniforms))
        found: list[tuple[float, Assignment]] = []
        rows = []
        for step, budget in enumerate(sorted(self.config.loss_budgets)):
            best = search.within(budget, self.config.rounds)
            found.append((budget, best))
            row = self._budget_row(budget, best, uniforms)
            rows.append([row[column] for column in BUDGET_COLUMNS])
            numbers: dict[str, float | None] = {
                f"budgets/{k}": float(v) for k, v in row.items() if isinstance(v, float | int)
            }
            self.reporter.metrics(step, numbers)
            self.reporter.table("budgets.json", BUDGET_COLUMNS, rows)
            self._say(f"within {budget:g} nats: {row}")
        self._measured(_summary(rows))
        return found

    def _known(self, uniforms: Sequence[Uniform]) -> dict[tuple[int, ...], LossIncrease]:
        """What has been measured of the asked method, as assignments."""
        known = {}
        for uniform in uniforms:
            if uniform.method == self.config.method:
                at, eight = self.candidates.index(uniform.candidate), self.candidates.index(Candidate(8))
                served = (at if uniform.candidate.is_served(group) else eight for group in self.groups)
                known[tuple(served)] = uniform.increase
        return known

    def _tried(self, chosen: tuple[int, ...]) -> LossIncrease:
        found = self._increase(self._assigned(chosen))
        self._say(f"tried {[self.candidates[at].label for at in chosen]}: {found}")
        return found

    def _budget_row(self, budget: float, best: Assignment, uniforms: Sequence[Uniform]) -> dict[str, Any]:
        stored = self._assigned(best.chosen)
        size = sum(matrix.nbytes for matrix in stored.values())
        kept = sorted((u for u in uniforms if u.increase.worst <= budget), key=lambda u: u.bytes)
        rival = next((u for u in kept if u.method == self.config.method and not u.candidate.wide), None)
        return {
            "budget_nats": budget,
            "additive_nats": best.additive_nats,
            "predicted_nats": best.predicted_nats,
            "measured_nats": best.measured.nats,
            "check_nats": best.measured.check_nats,
            "bytes": size,
            "joules_per_token": self.cost.joules(stored),
            "uniform": None if rival is None else f"{rival.candidate.label} {rival.method}",
            "uniform_bytes": None if rival is None else rival.bytes,
            "bytes_over_uniform": None if rival is None else size / rival.bytes,
            "bytes_over_any_uniform": size / kept[0].bytes if kept else None,
            "measurements": best.measurements,
        }

    def _plot(
        self, table: TensorTable, losses_GC: list[list[float]], found: Sequence[tuple[float, Assignment]]
    ) -> None:
        losses = {
            candidate.label: [row[at] for row in losses_GC]
            for at, candidate in enumerate(self.candidates if losses_GC else [])
        }
        widest = self.candidates.index(Candidate(16))
        whole = sum(self._cost(group, self.candidates[widest]) for group in self.groups)
        budgets = [(budget, best.measured.nats, best.cost / whole) for budget, best in found]
        names = [group.name.removeprefix("blocks.") for group in self.groups]
        self.reporter.text("compression.svg", figure(table, names, losses, budgets))

    def _write(self, budget: float, best: Assignment) -> None:
        """The checkpoint of an assignment."""
        stored, choices = self._assigned(best.chosen), self._choices(best.chosen)
        gone = {f"{name}.weight" for name in stored}
        gone |= {name.rpartition(".")[0] for name in stored if name.rpartition(".")[2].isdecimal()}
        plain = {name: tensor for name, tensor in self.model.state_dict().items() if name not in gone}
        config = {**self.config.model_dump(mode="json"), "model": self.model.config.model_dump(mode="json")}
        held = self.whole.nats + best.measured.nats
        manifest = {
            "config": config,
            "fingerprints": self.fingerprints,
            "versions": self.spec.versions,
            "job_id": self.spec.job_id,
            "attempt": self.spec.attempt,
            "workload": self.spec.workload,
            "budget": {"nats": budget, **asdict(best.measured), "predicted_nats": best.predicted_nats},
        }
        store = open_checkpoints(self.spec.checkpoints)
        saved = save_compressed(store, STEP, plain, stored, choices, manifest)
        before = 4 * sum(weight.numel() for weight in self.weights.values())
        after = sum(matrix.nbytes for matrix in stored.values())
        after += 4 * sum(w.numel() for n, w in self.weights.items() if n not in stored)
        self._measured(
            {
                "loss_budget_nats": budget,
                "predicted_nats": best.predicted_nats,
                "measured_nats": best.measured.nats,
                "check_nats": best.measured.check_nats,
                "bytes_before": before,
                "bytes_after": after,
                "stored_bytes": saved.size_bytes,
            }
        )
        joules = self.cost.joules(stored)
        if joules is not None:
            self._measured({"joules_per_token": joules})
        self.reporter.facts(checkpoint=saved.address, held_out_loss_nats=held)
        self._say(f"written: {saved.address}, {after:,} bytes of matrices in place of {before:,}")

    def _assigned(self, chosen: Sequence[int]) -> dict[str, Compressed]:
        return {
            name: self._store(name, self.candidates[at])
            for group, at in zip(self.groups, chosen, strict=True)
            for name in group.matrices
        }

    def _choices(self, chosen: Sequence[int]) -> dict[str, MatrixChoice]:
        return {
            name: self.candidates[at].choice(self._shape(name), self.config)
            for group, at in zip(self.groups, chosen, strict=True)
            for name in group.matrices
        }

    def _increase(self, stored: Mapping[str, Compressed]) -> LossIncrease:
        return LossIncrease(
            self.loss.loss(stored) - self.whole.nats, self.check.loss(stored) - self.whole.check_nats
        )

    def _cost(self, group: MatrixGroup, candidate: Candidate) -> float:
        stored = {name: self._store(name, candidate) for name in group.matrices}
        if self.config.objective == "bytes":
            return float(sum(matrix.nbytes for matrix in stored.values()))
        joules = self.cost.joules(stored)
        if joules is None:
            raise SpecError(
                "The cluster states no joules_per_byte and joules_per_flop.", "State them, or ask for bytes."
            )
        return joules

    def _store(self, name: str, candidate: Candidate) -> Compressed:
        return self.shelf(name, candidate.choice(self._shape(name), self.config))

    def _shape(self, name: str) -> tuple[int, int]:
        outputs, inputs = self.weights[name].shape
        return outputs, inputs

    def _measured(self, found: Mapping[str, float]) -> None:
        """Into the record, and the run's metrics."""
        self.measures |= {name: float(value) for name, value in found.items()}
        self.reporter.metrics(0, dict(found))

    def _say(self, line: str) -> None:
        print(line, flush=True)


def _summary(rows: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Over all budgets: how many are kept, the median of predicted over measured, the geometric mean of the bytes over
    the best uniform width's.
    """
    table = [dict(zip(BUDGET_COLUMNS, row, strict=True)) for row in rows]
    kept = sum(max(r["measured_nats"], r["check_nats"]) <= r["budget_nats"] for r in table)
    found = {"budgets": float(len(table)), "budgets_kept": float(kept)}
    for name in ("predicted", "additive"):
        shares = [r[f"{name}_nats"] / r["measured_nats"] for r in table if r["measured_nats"] > 0]
        if shares:
            found[f"{name}_over_measured"] = median(shares)
    for name in ("bytes_over_uniform", "bytes_over_any_uniform"):
        ratios = [math.log(r[name]) for r in table if r[name] is not None]
        if ratios:
            found[name] = math.exp(sum(ratios) / len(ratios))
    return found
