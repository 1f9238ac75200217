"""`model.attention: auto`: which kind a model gets, chosen once before it is trained (docs/theory A.8)."""

from __future__ import annotations

from dataclasses import dataclass

from escala.contract.errors import SpecError
from escala.schema.attention.kind import KINDS, AttentionKind
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
    window_tokens: int | None = None

    @property
    def section(self) -> AttentionKind:
        """The kind without options."""
        return KINDS.read(self.kind)


def choose(
    context_tokens: int,
    window_tokens: int | None,
    table: AttentionSpeed | None,
    precision: str,
    pilot: Pilot | None = None,
    device: str = "this device",
) -> AttentionChoice:
    """The kind for a context of T tokens on a device.

    Exact up to the window, since it is the same there, and below the T at which the candidate overtakes it in training.
    The candidate is `window` where a pilot says that ENOUGH_MASS lies inside it; else, and without a pilot, `hybrid`.

    Args:
        window_tokens: as the model states it; None: the pilot's, else that of the table.
        table: of the device, in the precision.
        device: for people.

    Raises SpecError for a pilot of another window, and where the table that decides is missing.
    """
    exact = str(KINDS.default)
    window = _window(window_tokens, table, pilot)
    if context_tokens <= window:
        reason = f"T {context_tokens} is not above the window of {window} tokens"
        return AttentionChoice(exact, f"{reason}: kinds with a window are exact there")
    kind, why = _candidate(pilot)
    if table is None or kind not in table.kinds:
        raise SpecError(
            f"attention {AUTO} needs to know at which T {kind} overtakes {exact} in {precision}, and {device} has no "
            "such table",
            f"escala bench attention --precision {precision} --to FILE.yaml, and ESCALA_CLUSTER=FILE.yaml; or state "
            "model.attention",
        )
    at, measured = (
        table.kinds[kind].train_overtakes,
        f"{precision}, window {table.window_tokens}, {table.source}",
    )
    if at is None:
        most = max(table.kinds[kind].train, default=0)
        return AttentionChoice(
            exact, f"up to T {most} {kind} does not overtake {exact} in training ({measured}); {why}"
        )
    crossover = f"the T {at} from which on {kind} overtakes {exact} in training ({measured}); {why}"
    if context_tokens < at:
        return AttentionChoice(exact, f"T {context_tokens} is below {crossover}")
    return AttentionChoice(kind, f"T {context_tokens} is not below {crossover}", window)


def _window(stated: int | None, table: AttentionSpeed | None, pilot: Pilot | None) -> int:
    if pilot is not None:
        if stated not in (None, pilot.window_tokens):
            raise SpecError(
                f"the pilot {pilot.run} has measured a window of {pilot.window_tokens} tokens, and "
                f"model.window_tokens is {stated}",
                f"set model.window_tokens={pilot.window_tokens}, or name a pilot that measured {stated}",
            )
        return pilot.window_tokens
    return stated or (WINDOW_TOKENS if table is None else table.window_tokens)


def _candidate(pilot: Pilot | None) -> tuple[str, str]:
    if pilot is None:
        return WITH_FAR_PART, "no pilot says that a window alone is enough"
    enough = pilot.mass >= ENOUGH_MASS
    said = (
        f"in pilot {pilot.run} {pilot.mass:.1%} of the attention mass lies in the last {pilot.window_tokens} tokens at "
        f"T {pilot.context_tokens}, {'at least' if enough else 'below'} {ENOUGH_MASS:.0%}"
    )
    return (ALONE if enough else WITH_FAR_PART), said
