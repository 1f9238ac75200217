"""What an iteration of PPO measures over all ranks: of the policy against its reference, of the responses, of the work.

The functions that sum are collective calls. Dimensions: B rows, T response tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from workloads.alignment.calibration import explained_variance
from workloads.alignment.kl import kl
from workloads.alignment.learner import Updates
from workloads.alignment.microbatches import RolloutBatch
from workloads.alignment.rollouts import Response, Scores

SAMPLES_KEPT, SAMPLES_EACH = 500, 4
SAMPLE_COLUMNS = ["iteration", "prompt", "response", "reward", "finished"]


def of_reference(rows: RolloutBatch, device: torch.device) -> dict[str, float]:
    """KL(policy|reference): the three estimators a token (docs/theory C.5), and k1 a response."""
    pair, mask = (rows.columns["logp_old"], rows.columns["logp_ref"]), rows.mask_BT
    sums = [torch.where(mask, kl(*pair, kind), 0.0).sum().item() for kind in ("k1", "k2", "k3")]
    *sums, tokens, responses = _summed(device, *sums, float(mask.sum()), float(len(rows)))
    found = {f"kl_k{i + 1}_nats_per_token": value / tokens for i, value in enumerate(sums)}
    return found | {"kl_nats": sums[0] / responses}


def of_responses(
    rows: RolloutBatch,
    responses: Sequence[Response],
    scores: Scores,
    entropies: float,
    version: int,
    device: torch.device,
) -> dict[str, float]:
    """What the responses say of the policy that drew them.

    Args:
        scores: of the responses; their parts are told apart where there are two or more.
        entropies: the sum over this rank's response tokens, in nats.
        version: of the weights that learn from them.
    """
    mask, columns = rows.mask_BT, rows.columns
    gap_BT = torch.where(mask, columns["logp_old"] - columns["engine_logp"], 0.0).abs()
    by_response = {
        "reward": math.fsum(scores.sums),
        "finished_fraction": float(sum(one.finished for one in responses)),
        "staleness_versions": float(sum(version - one.version for one in responses)),
        "response_tokens": float(mask.sum()),
    }
    if len(scores.parts) > 1:
        by_response |= {f"reward_{name}": math.fsum(part) for name, part in scores.parts.items()}
    by_token = {"entropy_nats": entropies, "engine_gap_nats": float(gap_BT.sum())}
    count, *sums = _summed(device, float(len(responses)), *by_response.values(), *by_token.values())
    found = {name: value / count for name, value in zip(by_response, sums, strict=False)}
    tokens = found["response_tokens"] * count
    found |= {name: value / tokens for name, value in zip(by_token, sums[len(by_response) :], strict=True)}
    found["engine_gap_max_nats"] = _largest(device, float(gap_BT.max()))
    if "returns" in columns:  # a critic
        variance = float(explained_variance(columns["values"], columns["returns"], mask))
        found |= {"explained_variance": variance} if math.isfinite(variance) else {}
    return found


def _summed(device: torch.device, *values: float) -> list[float]:
    """The sums over all ranks."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def _largest(device: torch.device, value: float) -> float:
    """Of all ranks."""
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return float(shared)


def of_work(
    rows: RolloutBatch, updates: Updates, minibatches: int, seconds: Mapping[str, float]
) -> dict[str, float]:
    """What the updates found, and the tokens per second of each phase.

    Args:
        rows: of all ranks.
        seconds: of the phases rollouts, rewards, assessment, learning.
    """
    generated, tokens = int(rows.mask_BT.sum()), sum(rows.lengths)
    learned = {name: float(value) for name, value in asdict(updates).items() if name != "steps"}
    return {
        **learned,
        "updates": updates.steps,
        "rollout_tokens_per_second": generated / seconds["rollouts"],
        "reward_tokens_per_second": generated / seconds["rewards"],
        "assessment_tokens_per_second": tokens / seconds["assessment"],
        "learning_tokens_per_second": tokens * updates.steps / minibatches / seconds["learning"],
    }


def of_rollouts(responses: Sequence[Response], device: torch.device) -> dict[str, float]:
    """What the engines' steps took for the responses of all ranks, in CPU seconds, and what became of drafted tokens
    where there were any (docs/theory A.9). A collective call.
    """
    own = [(one.cpu_seconds, float(one.drafted), float(one.accepted)) for one in responses]
    seconds, drafted, accepted = _summed(device, *map(math.fsum, zip(*own, strict=True)))
    found = {"rollout_cpu_seconds": seconds}
    return found | ({"drafted_tokens": drafted, "draft_acceptance": accepted / drafted} if drafted else {})


def samples(iteration: int, responses: Sequence[Response], scores_B: Tensor) -> list[list[Any]]:
    """A few responses with their rewards, for people: rows of SAMPLE_COLUMNS."""
    return [
        [
            iteration,
            one.prompt if isinstance(one.prompt, str) else json.dumps(one.prompt),
            one.text,
            score,
            one.finished,
        ]
        for one, score in zip(responses[:SAMPLES_EACH], scores_B.tolist(), strict=False)
    ]
