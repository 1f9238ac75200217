"""The held-out loss of a model some of whose matrices are stored smaller, and what each group of them alone costs.

Dimensions: N sequences, T context, D model width, G groups, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from escala.schema.compression import MatrixChoice
from workloads.model.compression.groups import Candidate, MatrixGroup
from workloads.model.compression.layers import Compressed, compress, matrices
from workloads.model.compression.low_rank import LowRankWeight, truncate
from workloads.model.moe import MixtureOfExperts, mixtures
from workloads.model.transformer import Transformer

PASS_TOKENS, PASS_LOGITS = 4096, 1 << 25
"""Of one forward pass: 128 MiB of logits at most."""


def untied(model: Transformer) -> Transformer:
    """The same model with an output product of its own, which can be stored smaller while the table stays."""
    if model.unembedding is not None:
        return model
    config = model.config.model_copy(update={"tie_embeddings": False})
    with torch.device("meta"):
        plain = Transformer(config)
    table = model.embedding.weight.detach()
    state = {**model.state_dict(), "unembedding.weight": table.clone()}
    plain.load_state_dict(state, assign=True)
    return plain


class CompressedLoss:
    """The loss of an untied model on given tokens, in nats a token, its matrices as they are or stored smaller. The
    model is whole again after each call.

    Args:
        tokens_NT1: windows of T + 1 tokens.
    """

    def __init__(self, model: Transformer, tokens_NT1: Tensor) -> None:
        self.model, self.weights = model.eval().requires_grad_(False), matrices(model)
        self.ids_NT, self.targets_NT = tokens_NT1[:, :-1], tokens_NT1[:, 1:]
        context = self.ids_NT.shape[1]
        self._rows = max(1, min(PASS_TOKENS, PASS_LOGITS // model.config.vocab_size) // context)

    @torch.no_grad()
    def loss(self, stored: Mapping[str, Compressed] | None = None) -> float:
        """With the named matrices stored so."""
        with self.replaced(stored or {}):
            return self._tail(self._embedded(), 0)

    @torch.no_grad()
    def increases(
        self,
        groups: Sequence[MatrixGroup],
        candidates: Sequence[Candidate],
        store: Callable[[str, Candidate], Compressed],
        told: Callable[[str], None] = lambda line: None,
    ) -> list[list[float]]:
        """loss_GC above the whole model's, of each group alone stored as each candidate says. What the layers before a
        group make of the tokens is computed once.

        Args:
            store: a matrix, by its name, as a candidate stores it.
            told: of each group, once it is measured.
        """
        hidden_NTD = self._embedded()
        whole, layers = self._tail(hidden_NTD, 0), self.model.layers
        found: dict[str, list[float]] = {}
        for layer in range(len(layers) + 1):
            here = [g for g in groups if (len(layers) if g.layer is None else g.layer) == layer]
            for group in here:
                losses = []
                for candidate in candidates:
                    with self.replaced({name: store(name, candidate) for name in group.matrices}):
                        losses.append(self._tail(hidden_NTD, layer) - whole)
                found[group.name] = losses
                told(
                    f"{group.name}: "
                    + ", ".join(f"{c.label}: {x:+.5f}" for c, x in zip(candidates, losses, strict=True))
                )
            if layer < len(layers):
                hidden_NTD = self._through(hidden_NTD, layer, layer + 1)
        return [found[group.name] for group in groups]

    @contextmanager
    def replaced(self, stored: Mapping[str, Compressed]) -> Iterator[None]:
        """Within the context the named matrices hold what is stored of them."""
        kept = {name: self.weights[name].detach().clone() for name in stored}
        try:
            for name, matrix in stored.items():
                self.weights[name].copy_(matrix.dequantize())
            yield
        finally:
            for name, weight in kept.items():
                self.weights[name].copy_(weight)

    def _embedded(self) -> Tensor:
        embedded: Tensor = self.model.embedding(self.ids_NT)
        return embedded

    def _through(self, hidden_NTD: Tensor, first: int, last: int) -> Tensor:
        """After the layers from `first` up to `last`."""
        return torch.cat([self._part(part, first, last) for part in torch.split(hidden_NTD, self._rows)])

    def _part(self, hidden_NTD: Tensor, first: int, last: int) -> Tensor:
        shared = self.model.shared(hidden_NTD.shape[1], None, None, hidden_NTD)
        for layer in self.model.layers[first:last]:
            hidden_NTD = layer(hidden_NTD, *shared)
        return hidden_NTD

    def _tail(self, hidden_NTD: Tensor, first: int) -> float:
        """The loss, from what layer `first` is given."""
        total, layers = 0.0, len(self.model.layers)
        parts = zip(
            torch.split(hidden_NTD, self._rows), torch.split(self.targets_NT, self._rows), strict=True
        )
        for part, targets in parts:
            normed = self.model.final_norm(self._part(part, first, layers))
            logits = self.model.logits(normed).float()
            total += float(
                F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").double().sum()
            )
        return total / self.targets_NT.numel()


class Shelf:
    """The matrices of a model in every way that they were asked for, each made once; all ranks by one decomposition."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights, self._kept = weights, dict[tuple[str, MatrixChoice], Compressed]()
        self._factors: dict[str, LowRankWeight] = {}

    def __call__(self, name: str, choice: MatrixChoice) -> Compressed:
        """The matrix `name` as `choice` says. Raises SpecError where it cannot be."""
        if (name, choice) not in self._kept:
            self._kept[name, choice] = (
                compress(self._weights[name], choice) if choice.rank is None else self._cut(name, choice.rank)
            )
        return self._kept[name, choice]

    def _cut(self, name: str, rank: int) -> LowRankWeight:
        """`truncate(weight, rank)`, of the factors of full rank."""
        weight = self._weights[name]
        if name not in self._factors:
            self._factors[name] = truncate(weight, min(weight.shape))
        whole = self._factors[name]
        return LowRankWeight(whole.left_OR[:, :rank].contiguous(), whole.right_RI[:rank].contiguous())


@contextmanager
def counted_choices(model: Transformer) -> Iterator[list[Tensor]]:
    """Within the context, how many tokens each expert of each mixture was chosen for, layer by layer (E,)."""
    layers: list[MixtureOfExperts] = mixtures(model)
    counts = [torch.zeros(layer.moe.experts, dtype=torch.float64) for layer in layers]

    def count(into: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            into.add_(torch.tensor(arguments[2].sizes, dtype=into.dtype))

        return add

    hooks = [
        layer.experts.register_forward_pre_hook(count(into))
        for layer, into in zip(layers, counts, strict=True)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
