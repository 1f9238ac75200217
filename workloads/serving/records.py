"""What goes between the deployments of the rollout service."""

from __future__ import annotations

from dataclasses import dataclass

from escala.rollouts.weights import WeightVersion
from workloads.data.messages import Message
from workloads.generation.protocol import Completion, Output

RequestPrompt = str | list[int] | list[Message]
"""A text, tokens, or the messages of a chat."""


@dataclass(frozen=True)
class Generated:
    """A response and the weights that it is from."""

    completion: Completion
    weights: WeightVersion
    prompt_tokens: int


@dataclass(frozen=True)
class GeneratedChunk:
    """A part of a response as it comes; the last one has a finish reason."""

    output: Output
    weights: WeightVersion
    prompt_tokens: int
