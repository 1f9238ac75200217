"""A mixture of experts in place of a block's feed-forward: router, choice, capacity, experts (docs/theory B).

Dimensions: B batch, T context, N = B T tokens, D model width, E experts, K experts that compute a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from escala.schema import ModelConfig, MoEConfig
from workloads.model import balance
from workloads.model.exchange import Exchange, compute_elsewhere
from workloads.model.experts import Experts
from workloads.model.gate import Choice, Dispatch, capacity, choose, dispatch, top_k
from workloads.model.layers import FeedForward, Linear
from workloads.model.sequence_capacity import bounds, keep


class Router(Linear):
    """Logits of the experts, in fp32 whatever the model's precision (Fedus et al. 2022, section 2.4)."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, E)."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        return F.linear(x_ND.to(dtype), self.weight.to(dtype))


@dataclass(frozen=True)
class Routing:
    """What one forward pass in training did with its N tokens.

    Attributes:
        losses: weighted, with their graph, by name.
        probability_E: p, the mean routing probability.
        load_E: tokens that chose each expert, dropped ones included; soft to hard: that evaluation would send there.
        dropped: choices that found no slot.
        entropy: mean entropy of a token's gate, in nats.
        balance_weight: lambda in force; 0 without a balance loss.
    """

    tokens: int
    probability_E: Tensor
    load_E: Tensor
    dropped: Tensor
    entropy: Tensor
    balance_weight: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


class MixtureOfExperts(nn.Module):
    """A residual branch that sends each token through k of E experts, and through the shared ones.

    Attributes:
        tau: temperature of estimators gumbel and soft_to_hard in training; the training loop lowers it.
        evaluation_capacity_factor: of the capacity in evaluation, which counts over each row's own positions
            (`sequence_capacity`); None: nothing is dropped.
        routing: of the last forward pass in training; None before one.
        exchange: with the ranks that share the experts; None: this one has all.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        output_gain: float,
        expert_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.moe = moe
        self.tau = 1.0 if moe.tau is None else moe.tau.start
        self.evaluation_capacity_factor = moe.evaluation_capacity_factor
        self.routing: Routing | None = None
        self.exchange: Exchange | None = None
        size = config.expert_size
        gain = output_gain / math.sqrt(1 + moe.shared_experts) if moe.shared_experts else output_gain
        self.router = Router(config.d_model, moe.experts)
        self.experts = Experts(moe.experts, config.d_model, size, gain)
        self.shared = (
            FeedForward(config.d_model, moe.shared_experts * size, gain) if moe.shared_experts else None
        )
        if expert_group is not None:
            self.share_experts(expert_group)

    def share_experts(self, group: ProcessGroup) -> None:
        """Keep this rank's share of the experts alone; the forward pass is then a collective call."""
        self.exchange = Exchange(group)
        self.experts.keep_share(self.exchange.rank, self.exchange.ranks)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D). A token that finds no slot keeps its residual stream as it is. In evaluation each row
        is a sequence from its first token.
        """
        moe, x_ND = self.moe, x_BTD.flatten(0, 1)
        logits_NE = self.router(x_ND)
        noisy_NE = logits_NE
        if self.training:
            if moe.noise_std:
                noisy_NE = logits_NE + moe.noise_std * torch.randn_like(logits_NE)
            choice = choose(noisy_NE, moe.chosen, moe.estimator, self.tau)
            limit = capacity(moe.capacity_factor, len(x_ND), moe.chosen, moe.experts)
            sent = dispatch(choice.experts_NK, len(x_BTD), moe.experts, limit)
        else:
            choice = self.served_choice(logits_NE)
            kept_NK = self._kept(choice.experts_NK, len(x_BTD))
            sent = dispatch(choice.experts_NK, len(x_BTD), moe.experts, None, kept_NK)
        if self.exchange is None:
            out_ND = self.experts(x_ND, choice.weights_NK, sent)
        else:
            out_ND = compute_elsewhere(self.experts, x_ND, choice.weights_NK, sent, self.exchange)
        if self.shared is not None:
            out_ND = out_ND + self.shared(x_ND)
        if self.training:
            self.routing = self._account(logits_NE, sent, limit)
        out_BTD: Tensor = out_ND.view_as(x_BTD)
        return out_BTD

    def served_choice(self, logits_NE: Tensor) -> Choice:
        """What evaluation and generation choose by these logits. A model that was trained soft to hard serves at its
        last temperature.
        """
        moe = self.moe
        sharp = moe.tau.end if moe.tau and moe.estimator == "soft_to_hard" else 1.0
        return top_k(logits_NE / sharp, moe.chosen)

    def _kept(self, experts_NK: Tensor, batch: int) -> Tensor | None:
        """In evaluation, which choices of `batch` whole sequences find a place; None: all."""
        moe, factor = self.moe, self.evaluation_capacity_factor
        if factor is None:
            return None
        experts_BTK = experts_NK.view(batch, -1, moe.chosen)
        positions_T = torch.arange(experts_BTK.shape[1], device=experts_NK.device)
        bound_BT = bounds(positions_T, factor, moe.chosen, moe.experts).expand(batch, -1)
        return keep(experts_BTK, bound_BT, experts_NK.new_zeros(batch, moe.experts))[0].flatten(0, 1)

    def _account(self, logits_NE: Tensor, sent: Dispatch, limit: int | None) -> Routing:
        """Auxiliary losses and figures, of the logits before noise. Soft to hard, all experts take all tokens, which is
        even whatever the router prefers: the load is that of the k which evaluation would choose.
        """
        moe, tokens = self.moe, len(logits_NE)
        log_g_NE, load_E = logits_NE.log_softmax(dim=-1), sent.load_E.to(logits_NE.dtype)
        if moe.trained_experts > moe.chosen:
            chosen_NK = logits_NE.topk(moe.chosen, dim=-1).indices
            load_E = chosen_NK.flatten().bincount(minlength=moe.experts).to(logits_NE.dtype)
        log_p_E = balance.log_mean_probability(log_g_NE)
        losses, weight = {}, logits_NE.new_zeros(())
        if moe.balance is not None:
            losses["balance"], weight = balance.balance_loss(moe.balance, log_p_E, load_E)
        if moe.z_loss_weight:
            losses["router_z"] = moe.z_loss_weight * balance.z_loss(logits_NE)
        if moe.margin_weight:
            margin = balance.margin_loss(logits_NE, moe.chosen, moe.margin)
            losses["router_margin"] = moe.margin_weight * margin
        if moe.hinge_weight and limit is not None:
            hinge = balance.capacity_hinge(log_p_E, tokens * moe.chosen, limit)
            losses["capacity_hinge"] = moe.hinge_weight * hinge
        with torch.no_grad():
            return Routing(
                tokens=tokens,
                probability_E=log_p_E.exp(),
                load_E=load_E,
                dropped=sent.load_E.sum().to(load_E.dtype) - sum(sent.sizes),
                entropy=balance.entropy(log_g_NE),
                balance_weight=weight,
                losses=losses,
            )


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts in `model`, in its layers' order; none in a dense one."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
