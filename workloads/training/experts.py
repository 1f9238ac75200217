"""The training loop's part in a mixture of experts: temperature, auxiliary losses, figures, the event of a collapse.

A dense model has no mixture: then every call here does nothing.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn

from escala.schema import Annealing, MoEConfig
from workloads.model.balance import load_ratio, symmetric_kl
from workloads.model.moe import Routing, mixtures
from workloads.training.report import Reporter

COLLAPSE_TAG = "escala.event.collapse"


def temperature(step: int, total_steps: int, tau: Annealing) -> float:
    """tau of step `step` (0, 1, ...): from start to end in equal ratios over `fraction` of the run, then end."""
    done = min(1.0, step / max(1.0, tau.fraction * (total_steps - 1)))
    return float(tau.start * (tau.end / tau.start) ** done)


def expert_group(moe: MoEConfig | None) -> torch.distributed.ProcessGroup | None:
    """The ranks that share the experts (`moe.expert_parallel`); None where each has all."""
    asked = moe is not None and moe.expert_parallel and torch.distributed.get_world_size() > 1
    return torch.distributed.group.WORLD if asked else None


class Routers:
    """The mixtures of a model in training. Figures add up over the micro-batches since they were last read. Makes the
    ranks share the experts where the model says so and was not drawn so (one that was read has them all), so make it
    before the engine.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        self.layers = mixtures(model)
        self.total_steps = total_steps
        self.has_collapsed = False
        for layer in self.layers:
            group = expert_group(layer.moe)
            if group is not None and layer.exchange is None:
                layer.share_experts(group)
        self._sums: list[Tensor] = []  # by layer: load_E, p_E x tokens, tokens, and 3 more, see _summed

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent to those that it shares experts with."""
        return sum(layer.exchange.sent_bytes for layer in self.layers if layer.exchange is not None)

    def begin_step(self, step: int) -> None:
        """Set what depends on the step."""
        for layer in self.layers:
            if layer.moe.tau is not None:
                layer.tau = temperature(step, self.total_steps, layer.moe.tau)

    def loss(self) -> Tensor | float:
        """The weighted auxiliary losses of the last forward pass, over all layers; and count its figures. Add it to the
        mean loss of the micro-batch: their mean over micro-batches and ranks is then the step's.
        """
        routings = [layer.routing for layer in self.layers if layer.routing is not None]
        if not routings:
            return 0.0
        new = [_summed(routing) for routing in routings]
        self._sums = [a + b for a, b in zip(self._sums, new, strict=True)] if self._sums else new
        losses = [loss for routing in routings for loss in routing.losses.values()]
        return torch.stack(losses).sum() if losses else 0.0

    def metrics(self) -> dict[str, float]:
        """docs/theory B.6 over all ranks since the last call, which resets them: means over layers, the hard-load
        ratio's maximum. A collective call; nothing for a dense model, or before the first step.
        """
        if not self._sums:
            return {}
        sums_LX = torch.stack(self._sums)
        self._sums = []
        torch.distributed.all_reduce(sums_LX)
        figures = [_figures(sums_X) for sums_X in sums_LX]
        found = {key: sum(f[key] for f in figures) / len(figures) for key in figures[0]}
        ratios = [f["expert_load_ratio"] for f in figures]
        found["expert_load_ratio"] = max(ratios)
        found["collapsed_layers"] = float(sum(ratio > self._bound for ratio in ratios))
        if self.layers[0].moe.tau is not None:
            found["router_tau"] = self.layers[0].tau
        return found

    def report(self, step: int, reporter: Reporter | None) -> None:
        """Report the figures after `step` steps, and tag the run at its first collapse. A collective call: every rank
        makes it, and rank 0 has the reporter.
        """
        found = self.metrics()
        if reporter is None or not found:
            return
        reporter.metrics(step, dict(found))
        if found["collapsed_layers"] and not self.has_collapsed:
            self.has_collapsed = True
            event = (
                f"step {step}: {found['collapsed_layers']:.0f} layers; an expert has "
                f"{found['expert_load_ratio']:.2f} times the mean load (bound {self._bound:g})"
            )
            print(f"experts collapsed: {event}", flush=True)
            reporter.tag(COLLAPSE_TAG, event)

    @property
    def _bound(self) -> float:
        return self.layers[0].moe.collapse_ratio


def _summed(routing: Routing) -> Tensor:
    """What adds up over micro-batches and ranks, as one vector in float64."""
    tokens = float(routing.tokens)
    single = torch.stack(
        [
            routing.dropped.double(),
            routing.entropy.double() * tokens,
            routing.balance_weight.double() * tokens,
            torch.tensor(tokens, dtype=torch.float64, device=routing.dropped.device),
        ]
    )
    return torch.cat([routing.load_E.double(), routing.probability_E.double() * tokens, single])


def _figures(sums_X: Tensor) -> dict[str, float]:
    """One layer's."""
    experts = (len(sums_X) - 4) // 2
    load_E, p_sum_E = sums_X[:experts], sums_X[experts : 2 * experts]
    dropped, entropy, weight, tokens = sums_X[2 * experts :].tolist()
    p_E = p_sum_E / tokens
    return {
        "router_balance_distance": float((p_E - 1 / experts).norm()),
        "router_balance_nats": float(symmetric_kl(p_E.clamp(min=torch.finfo(p_E.dtype).tiny).log())),
        "expert_load_ratio": float(load_ratio(load_E)),
        "expert_overflow": dropped / float(load_E.sum()),
        "gate_entropy_nats": entropy / tokens,
        "balance_weight": weight / tokens,
    }
