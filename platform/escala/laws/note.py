"""A law's page in MLflow: what it says, what is wrong with it, how to use it (Markdown), and its table as a dataset."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from escala.laws.inputs import SIZE
from escala.laws.law import Law

REFUSED_ROWS = 20
NAME_CHARACTERS, FINDINGS = 480, 30  # of a dataset's name in MLflow; of a note that stays readable
OF_A_RUN, OF_A_VERSION = 8000, 5000  # characters that MLflow's database keeps of a tag, and of a description
REPORT = "report.html"  # the artifact of the law's run that has all of it
REST = f"\n\nThe rest is in the run's artifact {REPORT}.\n"


def headline(law: Law, reference: str) -> str:
    """The run's name: `small@3, healthy`."""
    return f"{reference}, {'healthy' if law.healthy else 'NOT healthy'}"


def note(law: Law, reference: str, provenance: dict[str, Any]) -> str:
    """The Markdown of a law's run."""
    size = f"N is {law.size}; " if SIZE in law.form.inputs else ""
    parts = [
        f"# {headline(law, reference)}",
        f"`loss = {law.form.formula}` ({size}loss in nats per token). With plots: artifact {REPORT}.",
        _parameters(law),
        "## Findings\n\n" + ("\n".join(f"- {f}" for f in law.findings[:FINDINGS]) or "None."),
        _backtest(law),
        _points(law, provenance),
        _usage(law, reference),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def within(text: str, characters: int) -> str:
    """The text, cut after a line and with a word on where the rest is if it is longer than `characters`."""
    if len(text) <= characters:
        return text
    kept = text[: characters - len(REST)]
    return kept.rpartition("\n")[0] + REST


def _parameters(law: Law) -> str:
    intervals = law.intervals(0.9) if law.has_intervals else {}
    rows = ["| parameter | value | 90 % interval |", "|---|---|---|"]
    for name, value in law.parameters.items():
        ends = intervals.get(name)
        said = "none" if ends is None else f"{ends[0]:.5g} to {ends[1]:.5g}"
        rows.append(f"| {name} | {value:.5g} | {said} |")
    return "\n".join(rows)


def _backtest(law: Law) -> str:
    """What refits to the smaller points said of the larger ones."""
    rolling = law.rolling
    if rolling is None or rolling.coverage is None:
        return ""
    low, high = rolling.coverage_interval()
    rows = [
        "| fitted to the smaller | points | asked of | beyond, at most | error | inside 90 % |",
        "|---|---|---|---|---|---|",
    ]
    for cut in rolling.cuts:
        error = sum(map(abs, cut.errors)) / len(cut.rows)
        rows.append(
            f"| {cut.by} <= {cut.largest:.4g} | {cut.train_points} | {len(cut.rows)} | {max(cut.factors):.3g}x | "
            f"{error:.2%} | {sum(cut.inside)} of {len(cut.rows)} |"
        )
    said = (
        f"Coverage {rolling.coverage:.0%} of {rolling.predictions} predictions of {rolling.points} points "
        f"(95 %: {low:.0%} to {high:.0%})."
    )
    return "\n".join(["## Backtest\n", *rows, "", said])


def _points(law: Law, provenance: dict[str, Any]) -> str:
    lines = [f"## Points\n\n{provenance['points']} used, {provenance['refused']} refused."]
    lines += [f"- from {source}" for source in provenance["sources"]]
    lines += [f"- {name}: {low:.5g} to {high:.5g}" for name, (low, high) in law.ranges.items()]
    lines += [f"- refused, row {row}: {reason}" for row, reason in law.refusals[:REFUSED_ROWS]]
    if len(law.refusals) > REFUSED_ROWS:
        lines.append(f"- and {len(law.refusals) - REFUSED_ROWS} more, in refused.csv")
    return "\n".join([lines[0], "", *lines[1:]])


def _usage(law: Law, reference: str) -> str:
    asked = " ".join(f"--at {name}={law.ranges[name][1]:.3g}" for name in law.inputs if name in law.ranges)
    name, _, version = reference.partition("@")
    lines = [
        "## Use\n\n```bash",
        f"escala laws show {reference}",
        f"escala laws predict {reference} {asked}",
    ]
    if law.form.no_split is None:
        lines.append(f"escala laws plan {reference} --compute-flops 1e21")
    lines += ["```\n\n```python", f'mlflow.pyfunc.load_model("models:/{name}/{version}")', "```"]
    return "\n".join(lines)


def dataset(law: Law, provenance: dict[str, Any]) -> Any:
    """MLflow's DatasetInput of the points: their source by name, their content by digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    content = json.dumps(law.table, sort_keys=True).encode()
    source = "; ".join(provenance["sources"]) or "points"
    made = Dataset(
        name=source[:NAME_CHARACTERS],
        digest=hashlib.sha256(content).hexdigest()[:32],
        source_type="escala",
        source=json.dumps({"sources": provenance["sources"], "artifact": "points.csv"}),
        profile=json.dumps({"num_rows": provenance["points"], "refused": provenance["refused"]}),
    )
    return DatasetInput(made, [InputTag("mlflow.data.context", "training")])
