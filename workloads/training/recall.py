"""The loss on a recall corpus by what the reader would have to recall, beside the exact one (docs/theory A.11)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from escala.schema import RecallCorpus
from workloads.data.recall import group_targets, ideal_loss, target_groups
from workloads.training.loss import log_probabilities

ARTIFACT = "recall.json"


class RecallTable:
    """The groups of the held-out targets: keys, values never shown, values by the distance to their key's last place.

    Args:
        held_out_NT1: the windows that every evaluation uses.
    """

    def __init__(self, corpus: RecallCorpus, held_out_NT1: Tensor) -> None:
        self.corpus, self.context_tokens = corpus, held_out_NT1.shape[1] - 1
        self.groups = target_groups(corpus, self.context_tokens)
        self.groups_NT = torch.from_numpy(group_targets(corpus, held_out_NT1.numpy()))

    def sums(self, logits_BTV: Tensor, targets_BT: Tensor, rows: list[int]) -> Tensor:
        """Summed losses of each group, then their numbers of targets, (2 groups,): of the windows `rows`."""
        losses = -log_probabilities(logits_BTV.flatten(0, 1), targets_BT.flatten()).double()
        groups = self.groups_NT[rows].flatten().to(losses.device)
        totals = losses.new_zeros(2, len(self.groups))
        totals[0].index_add_(0, groups, losses)
        totals[1].index_add_(0, groups, torch.ones_like(losses))
        return totals.flatten()

    def measures(self, totals: list[float]) -> tuple[dict[str, float], str]:
        """The measures of an evaluation, and its table as JSON, from the sums over all windows.

        A group without a target has no loss: None in the table, no measure.
        """
        size = len(self.groups)
        losses = [
            loss / count if count else None for loss, count in zip(totals[:size], totals[size:], strict=True)
        ]
        named = {group.name: loss for group, loss in zip(self.groups, losses, strict=True)}
        ideal = ideal_loss(self.corpus, self.context_tokens)
        rows: list[dict[str, Any]] = [
            {**asdict(group), "targets": int(count), "loss_nats": loss}
            for group, count, loss in zip(self.groups, totals[size:], losses, strict=True)
        ]
        table = {
            "context_tokens": self.context_tokens,
            "corpus": self.corpus.model_dump(mode="json"),
            "loss_nats": math.fsum(totals[:size]) / math.fsum(totals[size:]),
            "ideal_loss_nats": ideal,
            "ideal_loss_of_these_windows_nats": self._ideal_here(totals[size:]),
            "groups": rows,
        }
        found = {f"recall_{name}_loss_nats": loss for name, loss in named.items() if loss is not None}
        return {"ideal_loss_nats": ideal, **found}, json.dumps(table, indent=1)

    def _ideal_here(self, counts: list[float]) -> float:
        """What the ideal reader pays for values as they fell in these windows; keys at their entropy."""
        paid = math.fsum(g.ideal_loss_nats * count for g, count in zip(self.groups, counts, strict=True))
        return paid / math.fsum(counts)
