"""An iteration's scores as rewards: normalised, clipped, penalties taken off (docs/theory C.1)."""

from __future__ import annotations

from torch import Tensor

from escala.schema import PpoConfig
from workloads.alignment.token_rewards import RunningMoments, length_penalty, missing_eos_penalty


class ScoreShaping:
    """Of one rank. `moments` of all scores so far are its state, the same on every rank."""

    def __init__(self, config: PpoConfig) -> None:
        self.section, self.limit_tokens = config.shaping, config.sampling.max_response_tokens
        self.moments = RunningMoments()

    def shape(self, scores_B: Tensor, finished_B: Tensor, lengths_B: Tensor) -> Tensor:
        """The rewards (B,) of this rank's responses. A collective call.

        Args:
            finished_B: whether a response ended by itself.
            lengths_B: its tokens.
        """
        section = self.section
        self.moments.update(scores_B)
        if section.normalise:
            scores_B = self.moments.normalise(scores_B)
        if section.clip is not None:
            scores_B = scores_B.clamp(-section.clip, section.clip)
        scores_B = missing_eos_penalty(scores_B, finished_B, section.missing_eos_penalty)
        if not section.length_penalty:
            return scores_B
        free = section.length_free_tokens
        return length_penalty(scores_B, lengths_B, free, self.limit_tokens, section.length_penalty)
