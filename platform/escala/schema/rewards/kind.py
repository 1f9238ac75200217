"""What a kind of reward says of itself: a section that a workload's `rewards` list holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from escala.schema.base import Strict
from escala.schema.kinds import Kinds, KindSection


@dataclass(frozen=True)
class Needs:
    """What must be there before a job with a reward is queued (`workloads.preflight` looks)."""

    functions: tuple[
        str, ...
    ] = ()  # package.module:function of (prompts, responses), among the user's modules
    references: tuple[str, ...] = ()  # files of JSON lines of prompt, response
    models: tuple[str, ...] = ()  # files or directories


class Weighted(Strict):
    """Part of a sum."""

    weight: float = Field(
        1.0, allow_inf_nan=False, description="of this reward in the sum; of a function, 0: only measured"
    )


class RewardKind(KindSection, Weighted):
    """One kind of reward, with its options.

    Attributes:
        is_served: a deployment computes it, with a model of its own; else each worker does, for its own responses.
    """

    is_served: ClassVar[bool] = True

    @property
    def column(self) -> str:
        """The name by which a run records what workers compute, different for each of its rewards."""
        return self.kind

    def contradiction(self, responses_per_prompt: int) -> str | None:
        """Why it cannot reward so many responses to a prompt; None: it can."""
        return None

    def needs(self) -> Needs:
        """Nothing."""
        return Needs()


KINDS = Kinds[RewardKind]()
RewardConfig = Annotated[RewardKind, KINDS]
"""A section of `rewards`, of any kind."""
