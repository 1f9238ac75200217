"""Actor, critic and reference of one PPO rank: what they say of an iteration's rows, and how they learn from them.

A minibatch's gradient is that of its mean loss, however micro-batches and ranks cut it (docs/theory C.3).

Dimensions: B rows, T response tokens, S tokens of a row, N response tokens of a micro-batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from escala.contract.errors import Diverged
from escala.schema import PpoConfig, TrainingConfig
from workloads.alignment.advantages import gae, grpo, reinforce_plus_plus, rloo, to_tokens, whiten
from workloads.alignment.kl import kl, kl_loss
from workloads.alignment.losses import (
    clip_fraction,
    entropy,
    importance_weights,
    loss_count,
    policy_loss,
    value_loss,
)
from workloads.alignment.microbatches import MicroBatch, RolloutBatch, cut, deal, micro_batch, minibatches
from workloads.alignment.token_rewards import token_rewards
from workloads.model.compression.layers import dequantized
from workloads.model.lora import LoraMatrix, without_lora
from workloads.model.moe import mixtures
from workloads.training import zero
from workloads.training.loss import log_probabilities


@dataclass
class Updates:
    """What an iteration's minibatches found: means over them, but for the counts."""

    policy_loss: float = 0.0
    value_loss: float = 0.0
    clip_fraction: float = 0.0
    update_kl_nats: float = 0.0  # KL(policy before the iteration|policy), of a response; the last minibatch's
    gradient_norm: float = 0.0
    critic_gradient_norm: float = 0.0
    steps: int = 0
    stopped_early: bool = False

    def add(self, **found: float) -> None:
        """Take in a minibatch."""
        self.steps += 1
        for name, value in found.items():
            old = getattr(self, name)
            setattr(self, name, value if name == "update_kl_nats" else old + (value - old) / self.steps)


@dataclass
class CachedForward:
    """What an assessment's one forward pass of each engine found, with their graphs. Without a critic no values."""

    batch: MicroBatch
    logits_NV: Tensor
    values_N: Any = None


class Learner:
    """One rank's engines.

    Args:
        actor: a DeepSpeed engine around a Transformer.
        critic: one around a Critic; None: no critic.
        reference: a frozen Transformer; None: the actor without its deltas.
    """

    def __init__(self, config: PpoConfig, actor: Any, critic: Any | None, reference: Any | None) -> None:
        self.config, self.actor, self.critic, self.reference = config, actor, critic, reference
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device: torch.device = actor.device
        self._cached: CachedForward | None = None

    @torch.no_grad()
    def assess(self, rows: RolloutBatch) -> tuple[dict[str, Tensor], Tensor, float]:
        """What the three say of this rank's rows before the first update: the columns logp_old_BT, logp_ref_BT and,
        with a critic, values_BT; the values_B after each row's last token; and the sum of the entropies of all
        response tokens. A collective call.
        """
        columns = {n: torch.zeros(rows.mask_BT.shape) for n in ("logp_old", "logp_ref", "values")}
        after_B, entropies = torch.zeros(len(rows)), 0.0
        engines = [e for e in (self.actor, self.critic) if e is not None]
        batches, self._cached = self._in_step(rows), None
        keep = self._serves_first_update(batches, engines)
        for engine in engines:
            engine.train(keep)
        for batch in batches:
            with torch.set_grad_enabled(keep):
                logits_NV = self._logits(self.actor, batch)
            if keep:
                self._cached = CachedForward(batch, logits_NV)
            found = {"logp_old": log_probabilities(logits_NV, batch.targets_N)}
            entropies += float(_entropy_sum(logits_NV))
            del logits_NV
            found["logp_ref"] = log_probabilities(self._reference_logits(batch), batch.targets_N)
            if self.critic is not None:
                with torch.set_grad_enabled(keep):
                    found["values"], last = _values_and_last(self.critic, batch)
                if self._cached is not None:
                    self._cached.values_N = found["values"]
                after_B[batch.rows] = last.cpu()
            for name, values_N in found.items():
                placed_BT = batch.place(values_N).cpu()
                columns[name][batch.rows, : placed_BT.shape[1]] = placed_BT[: len(batch.rows)]
        for engine in engines:
            engine.train()
        return columns, after_B, entropies

    def _serves_first_update(self, batches: Sequence[MicroBatch], engines: Sequence[Any]) -> bool:
        """Whether the first update needs the very passes of the assessment, so that their graphs are kept: the same
        rows in one micro-batch, by the same weights. The graphs of all engines together are no larger than one of
        `micro_batch_tokens`. Not for mixtures, which route otherwise in training, nor for ZeRO-3, whose hooks expect
        a backward pass before the next forward one.
        """
        batch, training = self.config.batch, self.config.training
        if self.ranks > 1 or batch.minibatches > 1 or len(batches) > 1 or training.zero_stage == 3:
            return False
        if any(mixtures(engine.module) for engine in engines):
            return False
        return len(engines) * batches[0].tokens_BS.numel() <= batch.micro_batch_tokens

    def update(self, rows: RolloutBatch, iteration: int, kl_coef: float, freeze_actor: bool) -> Updates:
        """All epochs of an iteration on all ranks' rows. A collective call.

        Raises Diverged where a loss or a gradient is not finite.
        """
        config, updates = self.config, Updates()
        for epoch in range(config.batch.epochs):
            parts = minibatches(len(rows), config.batch.minibatches, config.training.seed, iteration, epoch)
            for part in parts:
                try:
                    self._minibatch(rows, part, kl_coef, freeze_actor, updates)
                except Diverged as error:
                    where = f"iteration {iteration + 1}, epoch {epoch + 1}"
                    raise Diverged(f"training diverged in {where}: {error.message}", error.hint) from None
                multiple, target = config.kl.early_stop_multiple, config.kl.target_nats
                if multiple and target and updates.update_kl_nats > multiple * target:
                    updates.stopped_early = True
                    return updates
        return updates

    def _minibatch(
        self, rows: RolloutBatch, part: Sequence[int], kl_coef: float, freeze_actor: bool, updates: Updates
    ) -> None:
        """One update of each engine, unless something is not finite."""
        cuts = deal(rows.lengths, part, self.ranks, self.config.batch.micro_batch_tokens)[self.rank]
        batches = [micro_batch(rows, one, self.device) for one in cuts]
        whole = rows.mask_BT[list(part)]
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        if not freeze_actor:
            self._accumulate(self.actor, batches, lambda b: self._actor_loss(rows, b, whole, kl_coef, sums))
        if self.critic is not None:
            critic = self.critic
            self._accumulate(critic, batches, lambda b: self._critic_loss(critic, rows, b, whole, sums))
        torch.distributed.all_reduce(sums)
        self._cached = None
        total, policy, value, clipped, moved = sums.tolist()
        if not math.isfinite(total):
            raise Diverged(f"the loss of a minibatch is {total}", DIVERGED_HINT)
        training, norms = self.config.training, [0.0, 0.0]
        if not freeze_actor:
            norms[0] = zero.optimizer_step(self.actor, training)
        if self.critic is not None:
            norms[1] = zero.optimizer_step(self.critic, training)
        if not all(map(math.isfinite, norms)):
            raise Diverged("a gradient's norm is not finite", DIVERGED_HINT)
        updates.add(
            policy_loss=policy,
            value_loss=value,
            clip_fraction=clipped,
            update_kl_nats=moved,
            gradient_norm=norms[0],
            critic_gradient_norm=norms[1],
        )

    def _accumulate(
        self, engine: Any, batches: Sequence[MicroBatch], loss: Callable[[MicroBatch], Tensor]
    ) -> None:
        """Add up this rank's part of a minibatch's gradient: `loss` is a micro-batch's share of the mean loss."""
        for place, batch in enumerate(batches):
            engine.set_gradient_accumulation_boundary(place == len(batches) - 1)
            # DeepSpeed averages over the ranks, and the shares are to be added.
            engine.backward(loss(batch) * self.ranks, scale_wrt_gas=False)

    def _actor_loss(
        self, rows: RolloutBatch, batch: MicroBatch, whole: Tensor, kl_coef: float, sums: Tensor
    ) -> Tensor:
        """A micro-batch's share of the policy's loss over the rows of mask `whole`; adds to `sums` what is reported."""
        section, kl_section, mask = self.config.policy_loss, self.config.kl, batch.mask_BT
        cached = self._cached_for(batch)
        logits_NV = self._logits(self.actor, batch) if cached is None else cached.logits_NV
        logp_BT = batch.place(log_probabilities(logits_NV, batch.targets_N))
        old_BT, advantages_BT = batch.take(rows.columns["logp_old"]), batch.take(rows.columns["advantages"])
        ratio = (logp_BT, old_BT, advantages_BT, mask, section.clip_low, section.clip_high)
        share = float(loss_count(mask, section.mode) / loss_count(whole, section.mode))
        tokens = float(mask.sum() / whole.sum())
        policy = policy_loss(*ratio, section.dual_clip, section.mode) * share
        loss = policy
        if kl_section.place == "loss" and kl_section.estimator is not None:
            reference_BT = batch.take(rows.columns["logp_ref"])
            loss = loss + kl_coef * tokens * kl_loss(logp_BT, reference_BT, mask, kl_section.estimator)
        if section.entropy_coefficient:
            loss = loss - section.entropy_coefficient * _entropy_sum(logits_NV) / whole.sum()
        moved_BT = torch.where(mask, kl(old_BT, logp_BT.detach(), "k3"), 0.0)
        found = [loss, policy, torch.zeros_like(policy), clip_fraction(*ratio, section.mode) * share]
        sums += torch.stack([*found, moved_BT.sum() / len(whole)]).detach().double()
        return loss

    def _critic_loss(
        self, critic: Any, rows: RolloutBatch, batch: MicroBatch, whole: Tensor, sums: Tensor
    ) -> Tensor:
        """A micro-batch's share of the critic's loss."""
        columns = {name: batch.take(rows.columns[name]) for name in ("values", "returns")}
        cached = self._cached_for(batch)
        values_BT = batch.place(critic(*batch.before_last) if cached is None else cached.values_N)
        clip = None if self.config.critic is None else self.config.critic.value_clip
        loss = value_loss(values_BT, columns["values"], columns["returns"], batch.mask_BT, clip)
        loss = loss * float(batch.mask_BT.sum() / whole.sum())
        sums[0] += loss.detach()
        sums[2] += loss.detach()
        return loss

    def _cached_for(self, batch: MicroBatch) -> CachedForward | None:
        """What the assessment computed, if it read the same rows."""
        cached = self._cached
        if cached is None or not torch.equal(cached.batch.tokens_BS, batch.tokens_BS):
            return None
        return cached if torch.equal(cached.batch.at_BS, batch.at_BS) else None

    def _logits(self, model: Any, batch: MicroBatch) -> Tensor:
        """Logits_NV at the sampling temperature."""
        tokens_BS, at_BS = batch.before_last
        logits_NV: Tensor = model(tokens_BS, at_BT=at_BS)
        temperature = self.config.sampling.temperature
        return logits_NV if temperature == 1 else logits_NV / temperature

    def _reference_logits(self, batch: MicroBatch) -> Tensor:
        if self.reference is not None:
            return self._logits(self.reference, batch)
        with without_lora(self.actor.module):
            return self._logits(self.actor, batch)

    def _in_step(self, rows: RolloutBatch) -> list[MicroBatch]:
        """This rank's rows as micro-batches, as many as every other rank has."""
        parts = cut(rows.lengths, range(len(rows)), self.config.batch.micro_batch_tokens)
        most = torch.tensor(len(parts), device=self.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        parts += [[]] * (int(most) - len(parts))
        return [micro_batch(rows, part, self.device) for part in parts]


DIVERGED_HINT = (
    "lower training.optimizer.learning_rate or critic.learning_rate; the last checkpoint is from before"
)


def _values_and_last(critic: Any, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Values_N before each response token, and values_B after each row's last."""
    at_BS = batch.at_BS | batch.last_BS
    values = critic(batch.tokens_BS, at_BT=at_BS)
    is_last = batch.last_BS[at_BS]
    return values[~is_last], values[is_last]


def _entropy_sum(logits_NV: Tensor) -> Tensor:
    """Sum of the entropies of all rows, in nats."""
    mask_1N = torch.ones(1, len(logits_NV), dtype=torch.bool, device=logits_NV.device)
    return entropy(logits_NV[None], mask_1N) * len(logits_NV)


def estimate(
    config: PpoConfig,
    rows: RolloutBatch,
    scores_B: Tensor,
    groups_B: Tensor,
    after_B: Tensor,
    kl_coef: float,
) -> dict[str, Tensor]:
    """The columns advantages_BT and, of gae, returns_BT, for this rank's rows (docs/theory C.1, C.2, C.6). A collective
    call: whitening is over all ranks' rows.

    Args:
        scores_B: what a response is worth, penalties included.
        groups_B: the same number for the responses to one prompt, all of which are here.
        after_B: the value after a response that was cut off; 0 after one that ended.
    """
    section, mask = config.advantage, rows.mask_BT
    in_reward = kl_coef if config.kl.place == "reward" else 0.0
    logp_BT = rows.columns["logp_old"]
    rewards_BT = token_rewards(scores_B, logp_BT, rows.columns["logp_ref"], mask, in_reward)
    found: dict[str, Tensor] = {}
    if section.kind == "gae":
        advantages_BT, found["returns"] = gae(
            rewards_BT,
            rows.columns["values"],
            mask,
            section.gamma,
            section.lam,
            after_B if section.bootstrap else None,
        )
        advantages_BT = whiten(advantages_BT, mask)
    elif section.kind == "reinforce_plus_plus":
        advantages_BT = reinforce_plus_plus(rewards_BT, mask, section.gamma)
    elif section.kind == "rloo":
        advantages_BT = to_tokens(rloo(rewards_BT.sum(-1), groups_B), mask)
    else:
        advantages_BT = to_tokens(grpo(rewards_BT.sum(-1), groups_B, section.kind == "grpo"), mask)
    if config.policy_loss.importance_cap is not None:
        cap = config.policy_loss.importance_cap
        advantages_BT = advantages_BT * importance_weights(logp_BT, rows.columns["engine_logp"], mask, cap)
    return found | {"advantages": advantages_BT}


def exchange(mine: RolloutBatch, prompts: int, responses_per_prompt: int) -> RolloutBatch:
    """All ranks' rows, in the order of their prompts: the same at every number of ranks. A collective call.

    Args:
        mine: the responses to the prompts rank, rank + ranks, ... of an iteration's.
    """
    ranks = torch.distributed.get_world_size()
    parts: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(parts, mine)
    keys = [
        (slot, number)
        for rank in range(ranks)
        for slot in range(rank, prompts, ranks)
        for number in range(responses_per_prompt)
    ]
    return RolloutBatch.join(parts, sorted(range(len(keys)), key=keys.__getitem__))


@torch.no_grad()
def policy_weights(engine: Any) -> dict[str, Tensor]:
    """The weights that the actor computes with, deltas merged, whole on the CPU of rank 0, under the names of a plain
    Transformer; empty on the other ranks. A collective call; one matrix at a time is gathered.
    """
    whole: dict[str, Tensor] = {}
    for prefix, module in engine.module.named_modules():
        own = dict(module.named_parameters(recurse=False))
        with zero.gathered(list(own.values())):
            if torch.distributed.get_rank():
                continue
            if isinstance(module, LoraMatrix):
                own = {"weight": module.merged()}
            for name, tensor in own.items():
                whole[f"{prefix}.{name}"] = tensor.detach().to("cpu", copy=True)
    if torch.distributed.get_rank() == 0:  # what is left of a quantised base
        whole |= {name: tensor.cpu() for name, tensor in dequantized(engine.module, besides=set(whole))}
    return whole


def critic_training(config: PpoConfig) -> TrainingConfig:
    """How the critic is trained: as the actor, at its own rate."""
    if config.critic is None:
        raise ValueError("this run has no critic")
    optimizer = config.training.optimizer.model_copy(update={"learning_rate": config.critic.learning_rate})
    return config.training.model_copy(update={"optimizer": optimizer})
