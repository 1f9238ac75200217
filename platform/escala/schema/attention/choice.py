"""`model.attention: auto`: which kind a model gets, chosen once before it is trained (docs/theory A.8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from escala.schema.attention.kind import KINDS
from escala.schema.attention.speed import AttentionSpeed
from escala.schema.attention.window import WINDOW_TOKENS

AUTO = "auto"
ENOUGH_MASS = 0.95
"""Of the attention's mass inside the window, for a window alone to do. An assumption, on the careful side: no run here
has measured at which share a window's loss is exact's. The share that decided stands in the choice's reason.
"""
WITH_FAR_PART, ALONE = "hybrid", "window"
"""The two that are linear in T and keep near attention sharp. `features` alone retrieves nothing (docs/theory A.10),
`nystrom` grows with T^2.
"""


@dataclass(frozen=True)
class Pilot:
    """What a run of exact attention has measured.

    Args:
        run: its name, for people.
        window_tokens, mass: the share of attention mass in the window, of queries that see more than it.
        context_tokens: T at which it was measured.
    """

    run: str
    window_tokens: int
    mass: float
    context_tokens: int


@dataclass(frozen=True)
class AttentionChoice:
    """The kind, why, and the window that the model gets with it (None: it has none)."""

    kind: str
    reason: str
    window_tokens: int | None


def choose(
    context_tokens: int,
    window_tokens: int | None,
    speeds: Mapping[str, AttentionSpeed],
    precision: str,
    pilot: Pilot | None = None,
    device: str = "this device",
) -> AttentionChoice:
    """The kind for a context of T tokens on a device.

    Exact up to the window, since it is the same there, and below the T at which the candidate overtakes it in training.
    The candidate is `window` where a pilot says that ENOUGH_MASS lies inside it; else, and without a pilot, `hybrid`.

    Args:
        window_tokens: as the model states it; None: the pilot's, else the one that was measured.
        speeds: of the device, by precision.

    Raises ValueError with what is missing: a pilot of another window, a table of the precision.
    """
    exact, table = str(KINDS.default), speeds.get(precision)
    if pilot is not None and window_tokens not in (None, pilot.window_tokens):
        raise ValueError(
            f"the pilot {pilot.run} measured a window of {pilot.window_tokens} tokens, and "
            f"model.window_tokens is {window_tokens}"
        )
    window = window_tokens or (pilot and pilot.window_tokens) or (table and table.window_tokens)
    if context_tokens <= (window or WINDOW_TOKENS):
        reason = f"T {context_tokens} is not above the window of {window or WINDOW_TOKENS} tokens"
        return AttentionChoice(exact, f"{reason}: all kinds with a window are exact there", None)
    if table is None or window is None:
        raise ValueError(f"{device} has no table of attention in {precision}")
    kind, why = _candidate(pilot)
    if kind not in table.kinds:
        raise ValueError(f"the table of attention of {device} in {precision} has no {kind}")
    speed = table.kinds[kind]
    measured = f"{precision}, window {table.window_tokens}, {table.source}"
    if speed.train_overtakes is None:
        most = max(speed.train, default=0)
        reason = f"{kind} does not overtake it in training up to T {most} ({measured}); {why}"
        return AttentionChoice(exact, reason, None)
    at = f"the T {speed.train_overtakes} at which {kind} overtakes it in training ({measured}); {why}"
    if context_tokens < speed.train_overtakes:
        return AttentionChoice(exact, f"T {context_tokens} is below {at}", None)
    return AttentionChoice(kind, f"T {context_tokens} is not below {at.replace('overtakes it', 'overtakes exact')}", window)


def _candidate(pilot: Pilot | None) -> tuple[str, str]:
    if pilot is None:
        return WITH_FAR_PART, "no pilot says that a window alone is enough"
    enough = pilot.mass >= ENOUGH_MASS
    said = (
        f"in pilot {pilot.run} {pilot.mass:.1%} of the attention mass lies in the last {pilot.window_tokens} tokens at "
        f"T {pilot.context_tokens}, {'at least' if enough else 'below'} {ENOUGH_MASS:.0%}"
    )
    return (ALONE if enough else WITH_FAR_PART), said
