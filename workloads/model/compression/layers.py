"""A transformer whose matrices are stored smaller, each in its own way.

Each matrix has a name: `blocks.3.attention.query`, `blocks.3.feed_forward.experts.up.5`, `unembedding` (the output
product, of a tied embedding too, whose table stays for look-up). Norms, tables and routers are never compressed.

Dimensions: O outputs, I inputs, E experts; `...` any leading ones.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from escala.contract.errors import SpecError
from escala.schema import ModelConfig
from escala.schema.compression import MatrixChoice
from workloads.model.compression.low_rank import HalfWeight, LowRankWeight, truncate
from workloads.model.compression.quantize import quantize
from workloads.model.compression.quantized import QuantizedWeight
from workloads.model.experts import STACKS, Experts
from workloads.model.gate import Dispatch
from workloads.model.layers import Linear
from workloads.model.transformer import Transformer

Compressed = QuantizedWeight | LowRankWeight | HalfWeight
UNEMBEDDING = "unembedding"


def compress(weight_OI: Tensor, choice: MatrixChoice) -> Compressed:
    """A matrix as `choice` says. Raises SpecError where it cannot be."""
    if choice.rank is not None:
        return truncate(weight_OI, choice.rank)
    if choice.bits == 16:
        return HalfWeight(weight_OI.detach().bfloat16())
    return quantize(weight_OI, choice.bits, choice.group, choice.method)


class _Product(torch.autograd.Function):
    """x W^T of a frozen matrix, which is made whole for the product, and again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compressed: Compressed) -> Tensor:
        ctx.compressed = compressed
        return F.linear(x, compressed.dequantize().to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.compressed.dequantize().to(grad.dtype), None


_product: Callable[[Tensor, Compressed], Tensor] = _Product.apply


class CompressedMatrix(nn.Module):
    """A matrix (O, I) as it is stored: buffers, which keep their dtypes whatever the model is cast to. Calling it gives
    (..., outputs) of (..., inputs).
    """

    def __init__(self, compressed: Compressed) -> None:
        super().__init__()
        self._like = compressed.with_tensors({n: t.to("meta") for n, t in compressed.tensors().items()})
        self.out_features, self.in_features = compressed.shape
        for name, tensor in compressed.tensors().items():
            self.register_buffer(name, tensor)

    @property
    def compressed(self) -> Compressed:
        """The matrix, where the module is."""
        return self._like.with_tensors(dict(self.named_buffers(recurse=False)))

    def forward(self, x: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """(..., inputs) to (..., outputs); `hidden` as in an Embedding that projects."""
        given = hidden if x is None else x
        if given is None:
            raise TypeError("CompressedMatrix needs x or hidden")
        return _product(given, self.compressed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device, not to another dtype: codes and scales are what was fitted."""
        fitted = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in fitted.items():
            moved = self.get_buffer(name)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self


class CompressedExperts(nn.Module):
    """Experts whose matrices are stored smaller, one by one: `gate.3` is expert 3's."""

    is_share = False

    def __init__(self, matrices: Mapping[str, list[CompressedMatrix]]) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.ModuleList(matrices[stack]) for stack in STACKS)

    def forward(self, x_ND: Tensor, weights_NK: Tensor, dispatch: Dispatch) -> Tensor:
        """As `Experts`."""
        chosen = dispatch.slot_NK.shape[1]
        x_SD = x_ND.index_select(0, dispatch.choice_S // chosen)
        parts = [
            down(F.silu(gate(x)).mul(up(x)))
            for x, gate, up, down in zip(
                torch.split(x_SD, dispatch.sizes), self.gate, self.up, self.down, strict=True
            )
        ]
        out_SD = torch.cat([*parts, x_ND.new_zeros(1, x_ND.shape[1])])  # the last: of a dropped choice
        return (out_SD[dispatch.slot_NK] * weights_NK.to(x_ND.dtype).unsqueeze(-1)).sum(1)


def matrices(model: Transformer) -> dict[str, Tensor]:
    """Name -> weight_OI of every matrix of a model that may be compressed and is not, in the model's order."""
    found: dict[str, Tensor] = {}
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, Linear) and not name.endswith(".router"):
            found[name] = module.weight
        elif isinstance(module, Experts):
            for stack in STACKS:
                weight_EOI = getattr(module, stack)
                found |= {f"{name}.{stack}.{expert}": w for expert, w in enumerate(weight_EOI)}
    if not isinstance(model.unembedding, CompressedMatrix):
        found[UNEMBEDDING] = (model.unembedding or model.embedding).weight
    return found


def compress_model(model: Transformer, choices: Mapping[str, MatrixChoice]) -> None:
    """Store the named matrices of `model` as `choices` say, in place; they are frozen from then on. Of a mixture's
    experts all or none: one without a choice is stored in bf16.

    Raises SpecError for a name that is none of `matrices`, and where a matrix cannot be stored so.
    """
    known = matrices(model)
    for name in choices:
        if name not in known:
            raise SpecError(f"The model has no matrix {name}.", f"It has {', '.join(list(known)[:8])}, ...")
    stored = {name: CompressedMatrix(compress(known[name], choice)) for name, choice in choices.items()}
    put_matrices(model, stored)


def put_matrices(model: Transformer, stored: Mapping[str, CompressedMatrix]) -> None:
    """Put stored matrices in the places of the model's own."""
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            name = f"{parent_name}.{child_name}"
            if isinstance(child, Experts) and any(key.startswith(f"{name}.") for key in stored):
                setattr(parent, child_name, _experts(name, child, stored))
            elif name in stored:
                setattr(parent, child_name, stored[name])
    if UNEMBEDDING in stored:
        model.unembedding = stored[UNEMBEDDING]  # type: ignore[assignment]  # it projects as an Embedding does


def _experts(name: str, experts: Experts, stored: Mapping[str, CompressedMatrix]) -> CompressedExperts:
    half = MatrixChoice(bits=16)
    return CompressedExperts(
        {
            stack: [
                stored.get(f"{name}.{stack}.{expert}") or CompressedMatrix(compress(weight, half))
                for expert, weight in enumerate(getattr(experts, stack))
            ]
            for stack in STACKS
        }
    )


def assembled(
    config: ModelConfig, stored: Mapping[str, Compressed], plain: Mapping[str, Tensor]
) -> Transformer:
    """The model of `config` with matrices as they are stored, by name, and the other parameters by theirs. It takes the
    tensors as its own. Raises RuntimeError where they are not those of the model.
    """
    with torch.device("meta"):
        model = Transformer(config)
    put_matrices(model, {name: CompressedMatrix(matrix) for name, matrix in stored.items()})
    placed = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    model.load_state_dict({**placed, **plain}, assign=True)
    return model


def decompress_model(model: Transformer) -> Transformer:
    """The same model in plain fp32 matrices. One whose output product was compressed has an unembedding of its own."""
    config = model.config
    if isinstance(model.unembedding, CompressedMatrix):
        config = config.model_copy(update={"tie_embeddings": False})
    with torch.device("meta"):
        plain = Transformer(config)
    state = {n: t for n, t in model.state_dict().items() if n in plain.state_dict()}
    state |= dequantized(model)
    plain.load_state_dict(state, assign=True)
    return plain


def dequantized(model: nn.Module, besides: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every compressed matrix of `model` in fp32, by the names of a plain model's weights: experts are stacked.

    Args:
        besides: names that are left out.
    """
    for prefix, module in model.named_modules():
        if isinstance(module, CompressedExperts):
            for stack in STACKS:
                each = [matrix.compressed.dequantize() for matrix in getattr(module, stack)]
                yield f"{prefix}.{stack}", torch.stack(each)
        elif isinstance(module, CompressedMatrix):
            is_expert = prefix.split(".")[-2:][0] in STACKS
            if not is_expert and f"{prefix}.weight" not in besides:
                yield f"{prefix}.weight", module.compressed.dequantize()


def compressed_bytes(model: nn.Module) -> int:
    """Of all weights as they are stored; a tied table once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
