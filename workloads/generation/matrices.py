"""A model's matrices as the engine multiplies by them: those of one input joined, each stored as the model stores it.

Dimensions: O outputs, I inputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.generation.kernel_choice import EngineLimits, Kernels, Product
from workloads.generation.linear import Matrix, form_of
from workloads.model.compression.layers import CompressedMatrix
from workloads.model.compression.low_rank import HalfWeight, LowRankWeight
from workloads.model.compression.quantized import QuantizedWeight
from workloads.model.experts import STACKS
from workloads.model.layers import FeedForward
from workloads.model.moe import MixtureOfExperts
from workloads.model.transformer import Block

Stored = Matrix | LowRankWeight
Multiply = Callable[[Tensor, bool], Tensor]
"""(N, O) of (N, I), and whether the rows are tiles of prompts."""
VOCAB_STEP = 64  # whole vector registers: the last lanes of an odd vocabulary would be computed by other code


def stored(module: nn.Module) -> Stored:
    """A projection's matrix, as the module has it."""
    if isinstance(module, CompressedMatrix):
        return module.compressed
    weight_OI: Tensor = module.weight  # type: ignore[assignment]
    return weight_OI.detach()


def groups_of(block: Block) -> Iterator[list[Stored]]:
    """The matrices of a block that are joined: queries, keys and values; output; then the feed-forward's."""
    attention = block.attention
    yield [stored(module) for module in (attention.query, attention.key, attention.value)]
    yield [stored(attention.output)]
    if type(block.feed_forward) is FeedForward:
        yield from dense_groups(block.feed_forward)
    elif isinstance(block.feed_forward, MixtureOfExperts):
        yield from mixture_groups(block.feed_forward)


def dense_groups(module: FeedForward) -> list[list[Stored]]:
    """Gate and up; down."""
    return [[stored(module.gate), stored(module.up)], [stored(module.down)]]


def mixture_groups(module: MixtureOfExperts) -> Iterator[list[Stored]]:
    """The router, in fp32; gate and up, down of each expert in turn; those of the shared ones."""
    yield [module.router.weight.detach().float()]
    stacks = [_each(getattr(module.experts, stack)) for stack in STACKS]
    for gate, up, down in zip(*stacks, strict=True):
        yield from ([gate, up], [down])
    if module.shared is not None:
        yield from dense_groups(module.shared)


def _each(stack: Any) -> list[Stored]:
    return [stored(m) for m in stack] if isinstance(stack, nn.ModuleList) else list(stack.detach())


def unembedding_of(module: nn.Module) -> Stored:
    """An output product's matrix, its outputs padded with zeros to a multiple of VOCAB_STEP."""
    matrix = stored(module)
    rows = -matrix.shape[0] % VOCAB_STEP
    if not rows:
        return matrix
    if isinstance(matrix, Tensor):
        return F.pad(matrix, (0, 0, 0, rows))
    tensors = matrix.tensors()
    padded = {n: t if n == "right" else F.pad(t, (0, 0, 0, rows)) for n, t in tensors.items()}
    return _of_tensors(matrix, padded, matrix.shape[0] + rows)


def joined(group: Sequence[Stored]) -> list[Stored]:
    """Matrices of one input as one, where they are stored alike; else as they are."""
    if len(group) == 1 or len({_kind(matrix) for matrix in group}) > 1:
        return list(group)
    head = group[0]
    if isinstance(head, LowRankWeight):
        return list(group)
    if isinstance(head, Tensor):
        return [torch.cat([matrix for matrix in group if isinstance(matrix, Tensor)])]
    each = [matrix.tensors() for matrix in group if not isinstance(matrix, Tensor)]
    tensors = {name: torch.cat([some[name] for some in each]) for name in head.tensors()}
    return [_of_tensors(head, tensors, sum(matrix.shape[0] for matrix in group))]


def _kind(matrix: Stored) -> tuple[object, ...]:
    if isinstance(matrix, LowRankWeight):
        return ("low rank",)
    dtypes = () if isinstance(matrix, Tensor) else tuple(t.dtype for t in matrix.tensors().values())
    return (form_of(matrix), *dtypes)


def _of_tensors(like: Any, tensors: dict[str, Tensor], outputs: int) -> Stored:
    """The same kind of matrix with other tensors, of another number of outputs."""
    changed: Stored = like.with_tensors(tensors)
    if isinstance(changed, QuantizedWeight):
        return replace(changed, shape=(outputs, like.shape[1]))
    return changed


def simple(matrix: Stored) -> tuple[Matrix, ...]:
    """The matrices that x is multiplied by, in order: of a low rank, two."""
    if isinstance(matrix, LowRankWeight):
        return HalfWeight(matrix.right_RI), HalfWeight(matrix.left_OR)
    return (matrix,)


def sample(groups: Iterable[list[Stored]], nbytes: int) -> list[Matrix]:
    """Some matrices of every form and shape, of each form as many as would take `nbytes` in fp32; those after them are
    not even joined for long.
    """
    found: list[Matrix] = []
    seen: dict[str, int] = {}
    shapes: set[tuple[object, ...]] = set()
    for matrix in chain.from_iterable(simple(m) for group in groups for m in joined(group)):
        form, shape = form_of(matrix), tuple(matrix.shape)
        if seen.get(form, 0) < nbytes or (form, shape) not in shapes:
            found.append(matrix)
            seen[form] = seen.get(form, 0) + 4 * matrix.shape[0] * matrix.shape[1]
            shapes.add((form, shape))
    return found


class Layout:
    """Makes matrices ready, by the kernels that were chosen.

    Attributes:
        nbytes: that all of them hold.
    """

    def __init__(self, kernels: Kernels, limits: EngineLimits) -> None:
        self._kernels, self._limits = kernels, limits
        self.nbytes = 0

    def lay(self, group: Sequence[Stored]) -> Multiply:
        """The product with all matrices of a group, side by side."""
        products = [self._chain(simple(matrix)) for matrix in joined(group)]
        if len(products) == 1:
            return products[0]
        return lambda x_NI, tiled: torch.cat([product(x_NI, tiled) for product in products], -1)

    def _chain(self, matrices: tuple[Matrix, ...]) -> Multiply:
        products = [self._product(matrix) for matrix in matrices]
        if len(products) == 1:
            return products[0]
        right, left = products
        return lambda x_NI, tiled: left(right(x_NI, tiled), tiled)

    def _product(self, matrix: Matrix) -> Product:
        product = Product(matrix, self._kernels[form_of(matrix)], self._limits)
        self.nbytes += product.nbytes
        return product


def release(module: nn.Module) -> None:
    """Let go of the memory of matrices that were laid out, not of their names and shapes: of compressed ones alone,
    since a model in full precision may still be read by whoever gave it.
    """
    for part in module.modules():
        if isinstance(part, CompressedMatrix):
            part.to("meta")
