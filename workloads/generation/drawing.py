"""A step's tokens, drawn together; what fails for one request ends that one alone.

Dimensions: N rows, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from escala.contract.errors import EscalaError, SpecError
from workloads.generation.protocol import RequestFailed, shown
from workloads.generation.sampling import Draw, sample
from workloads.generation.scheduler import Sequence, Work

Drawn = tuple[int, float]
"""A token and its log-probability."""
log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a token is drawn: after a work's last one and so many of its draft."""

    work: Work
    drafted: int

    @property
    def draw(self) -> Draw:
        """What it is drawn by."""
        sequence, seen = self.work.sequence, self.work.sequence.tokens
        if self.drafted and sequence.request.params.repetition_penalty != 1:
            seen = [*seen, *self.work.draft[: self.drafted]]
        return Draw(sequence.request.params, sequence.generated + self.drafted, seen)


def draw_tokens(logits_NV: Tensor, places: Many[Place]) -> list[Drawn | EscalaError]:
    """Of each row its token, or what is wrong with it alone."""
    try:
        found = zip(*sample(logits_NV, [place.draw for place in places]), strict=True)
    except Exception as error:
        if len(places) == 1:
            return [failed(places[0].work.sequence.request.id, error)]
        log.exception("a batch of tokens was not drawn: row by row")
        rows = zip(torch.split(logits_NV, 1), places, strict=True)
        return [draw_tokens(row, [place])[0] for row, place in rows]
    return [
        (token, logprob) if math.isfinite(logprob) else _undrawable(row, place.work.sequence)
        for (token, logprob), row, place in zip(found, logits_NV, places, strict=True)
    ]


def _undrawable(logits_V: Tensor, sequence: Sequence) -> EscalaError:
    """Why a row has no finite distribution."""
    name, params = sequence.request.id, sequence.request.params
    if logits_V.isnan().any() or logits_V.amax().isinf():
        return RequestFailed(
            f"Request {name!r} ended: the model's logits are not finite after {len(sequence.tokens)} tokens.",
            "Check the weights: some may be NaN or infinite.",
        )
    return SpecError(
        f"Request {name!r} ended: temperature {params.temperature:g} and repetition_penalty "
        f"{params.repetition_penalty:g} leave no finite distribution of this model's logits in fp32.",
        "Take values nearer to 1, or temperature 0.",
    )


def failed(request: str, error: BaseException) -> EscalaError:
    """The error that ends a request, of whatever was raised while it was served; logged where it is none of ours."""
    if isinstance(error, EscalaError):
        return error
    log.error("request %s ended with an error of its own", request, exc_info=error)
    return RequestFailed(
        f"The response was ended by {type(error).__name__}: {shown(str(error))}.",
        "Other requests are not touched; the log has the traceback. Please report it.",
    )
