"""`model.attention: auto` as the kind that is chosen for it, once, before a job is queued (docs/theory A.8)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from escala.contract.errors import NotFoundError, SpecError
from escala.documents import Section
from escala.hardware import load_cluster
from escala.jobs import actions, tracked_runs
from escala.schema import ModelConfig, TrainingConfig
from escala.schema.attention.choice import AUTO, AttentionChoice, Pilot, choose
from escala.schema.pretrain import MASS_IN_WINDOW, WINDOW_OF_MASS
from escala.settings import Settings

Written = dict[str, Any]
KEY, PILOT = "model.attention", "attention_pilot"


def resolve_attention(
    settings: Settings,
    written: Written,
    contexts: Iterable[float] = (),
    cluster: str | Path | None = None,
) -> tuple[Written, dict[str, str]]:
    """The spec with a kind in place of `auto`, and what was chosen (dotted key -> kind and reason; empty: nothing was).

    Args:
        contexts: of the runs of a space, whose largest T decides for all; none: the spec's own.
        cluster: whose device's table decides; None: ESCALA_CLUSTER.

    Raises SpecError for a pilot that measured nothing, or without `auto`; for a device without a table; NotFoundError.
    """
    model = written.get("model")
    asked = model.get("attention") if isinstance(model, Mapping) else None
    pilot = written.get(PILOT)
    if not isinstance(model, Mapping) or asked not in (AUTO, {"kind": AUTO}):
        if pilot is not None:
            raise SpecError(
                f"{PILOT} {pilot!r} decides which attention {AUTO} is, and {KEY} is not {AUTO}",
                f"set {KEY}={AUTO}, or leave {PILOT} out",
            )
        return written, {}
    device = load_cluster(cluster or settings.cluster).device
    precision = _section(written, "training").get("precision") or TrainingConfig().precision
    found = choose(
        int(max(contexts, default=_context(written))),
        model.get("window_tokens"),
        device.attention.get(precision),
        precision,
        None if pilot is None else read_pilot(settings, str(pilot)),
        f"the cluster {cluster or settings.cluster}",
    )
    return _with_choice(written, model, found), {KEY: f"{found.kind}: {found.reason}"}


def read_pilot(settings: Settings, name: str) -> Pilot:
    """What the run of a job (its id or name), or a run by its id, has measured. Raises SpecError where it has not,
    NotFoundError.
    """
    record = _record(settings, name)
    measures = record.get("measures") or {}
    mass, window, context = (
        measures.get(MASS_IN_WINDOW),
        measures.get(WINDOW_OF_MASS),
        record.get("context_tokens"),
    )
    if mass is None or window is None or context is None:
        raise SpecError(
            f"the pilot {name} has not measured the attention mass inside a window",
            "train it with exact attention and --set measure_attention_window=TOKENS, to its end",
        )
    return Pilot(name, int(window), float(mass), int(context))


def _record(settings: Settings, name: str) -> Mapping[str, Any]:
    """The last record of a job; of a run in the tracker (a sweep's trial) where no job has the name."""
    from dataclasses import asdict

    try:
        attempts = actions.job(settings, name).attempts
    except NotFoundError:
        return asdict(tracked_runs.run(settings, name))
    return next((each.record for each in reversed(attempts) if each.record), {})


def _context(written: Mapping[str, Any]) -> float:
    """T, as the spec states it or by default."""
    stated = _section(written, "training").get("context_tokens")
    return stated or _section(written, "model").get("max_context_tokens") or ModelConfig().max_context_tokens


def _section(written: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = written.get(name)
    return section if isinstance(section, Mapping) else {}


def _with_choice(written: Written, model: Mapping[str, Any], found: AttentionChoice) -> Written:
    """Its kind, and of the model's options those that the kind has."""
    kind = found.section
    dropped = {
        name for name, has in (("window_tokens", kind.window_tokens), ("features", kind.features)) if not has
    }
    chosen = {key: value for key, value in model.items() if key not in dropped} | {"attention": found.kind}
    if found.window_tokens is not None:
        chosen["window_tokens"] = found.window_tokens
    rest = {key: value for key, value in written.items() if key != PILOT}
    return Section({**rest, "model": Section(chosen, _places(model))}, _places(written))


def _places(section: Mapping[str, Any]) -> dict[str, str]:
    return dict(section.places) if isinstance(section, Section) else {}
