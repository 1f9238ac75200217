"""A reward that is a function of the user's."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from escala.schema.rewards.kind import KINDS, Needs, RewardKind


@KINDS.add
class FunctionRewardConfig(RewardKind):
    """A verifiable reward: `function(prompts, responses)` returns a number for each response."""

    is_served: ClassVar[bool] = False

    kind: Literal["function"]
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="package.module:function")

    @property
    def column(self) -> str:
        """The function's own name."""
        return self.function.partition(":")[2]

    def needs(self) -> Needs:
        """The function."""
        return Needs(functions=(self.function,))
