"""A Python process's view of the rollout service: what PPO calls. Needs a connection to the cluster (`ray.init`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayTaskError

from escala.rollouts import weights as contract
from escala.rollouts.weights import Published
from workloads.generation.protocol import SamplingParams
from workloads.serving.records import Generated, RequestPrompt

if TYPE_CHECKING:
    from torch import Tensor

APPLICATION = "escala"
"""The application's name, unless somebody gave it another."""


class Rollouts:
    """The service by its handle. Errors are raised as they were where they happened.

    Args:
        application: its name.
        timeout_seconds: for each call.
    """

    def __init__(self, application: str = APPLICATION, timeout_seconds: float | None = 600.0) -> None:
        self._handle: Any = serve.get_app_handle(application)
        self._timeout_seconds = timeout_seconds

    def generate(
        self,
        prompts: Sequence[RequestPrompt],
        params: SamplingParams | Sequence[SamplingParams],
        min_version: int = 0,
        max_staleness: int | None = None,
    ) -> list[Generated]:
        """A response to each prompt, in order: tokens, log-probabilities, finish reason, and the weights they are from.

        Args:
            prompts: token ids, texts, or chats.
            params: one for all, or one each. Different samples of one prompt need different seeds.
            min_version: of the weights. A replica behind it waits for what is announced.
            max_staleness: versions that a response may be behind the newest when it starts.

        Raises StaleWeights where the bound can't be kept, SpecError or DataError for a request that can't run,
        StateError where replica after replica died.
        """
        found: list[Generated] = self._ask("generate", list(prompts), params, min_version, max_staleness)
        return found

    def score(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """The reward of each response. Raises NotFoundError where the application has no reward."""
        scores: list[float] = self._ask("score", list(prompts), list(responses))
        return scores

    def compare(self, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Each first response's probability to be the better one. Raises NotFoundError without a judge."""
        verdicts: list[float] = self._ask("compare", list(prompts), list(first), list(second))
        return verdicts

    def describe(self) -> dict[str, Any]:
        """A policy replica's name, precision, context and weights."""
        found: dict[str, Any] = self._ask("describe")
        return found

    def store(self) -> Any:
        """The actor that keeps the weight versions (`escala.rollouts.store.Store`)."""
        return self._ask("weights_store")

    def publish(
        self, state: Mapping[str, Tensor], version: int, *, timeout_seconds: float = 120.0
    ) -> Published:
        """Make `state` the weights of every replica. See `escala.rollouts.weights.publish` for errors."""
        # Here, since it needs torch, which who only asks does without.
        from workloads.serving.weights import pack

        served = self.describe()["weights"]
        try:
            return contract.publish(
                self.store(),
                pack(state),
                version,
                precision=served.precision,
                capacity_factor=served.capacity_factor,
                kernels=served.kernels,
                timeout_seconds=timeout_seconds,
            )
        except RayTaskError as error:
            raise cause_of(error) from None

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._handle, method).remote(*arguments).result(timeout_s=self._timeout_seconds)
        except RayTaskError as error:
            raise cause_of(error) from None


def cause_of(error: RayTaskError) -> BaseException:
    """The error that was raised in an actor, out of Ray's wrapping."""
    cause: BaseException = error
    while isinstance(cause, RayTaskError) and isinstance(getattr(cause, "cause", None), BaseException):
        cause = cause.cause
    return cause
