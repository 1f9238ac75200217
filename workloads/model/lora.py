"""Low-rank deltas of frozen matrices (Hu et al. 2022), saved in peft's adapter format.

A matrix keeps its name and its shape; its two deltas stand beside it (`NAME.lora_A`, `NAME.lora_B`). Only they need
gradients, so only they are optimised, checkpointed and published.

Dimensions: R rank, `...` any leading ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from escala.schema import LoraConfig
from escala.schema.architectures import LLAMA_WEIGHTS
from workloads.model.compression.layers import UNEMBEDDING, CompressedMatrix, decompress_model
from workloads.model.compression.plan import quantize_model
from workloads.model.layers import Linear
from workloads.model.transformer import Transformer

BASE_FILE = "base_quantization.json"
"""Beside an adapter: how the base was quantised that it was trained on, for which peft has no key."""
PARENTS = {"query": "attention", "key": "attention", "value": "attention", "output": "attention"}


class LoraMatrix(nn.Module):
    """A frozen matrix with its deltas: x W^T + alpha / rank * dropout(x) A^T B^T. A is drawn as peft draws it (Kaiming,
    uniform), B is zero; both in fp32, or as wide as a plain matrix.

    Attributes:
        enabled: without it, the frozen matrix alone: the reference model of a policy that is trained by its deltas.
    """

    in_features: int
    out_features: int

    def add_deltas(self, config: LoraConfig, like: Tensor) -> None:
        """Draw them, of the device and dtype of `like`."""
        self.gain, self.dropout, self.enabled = config.alpha / config.rank, config.dropout, True
        self.lora_A = nn.Parameter(like.new_empty(config.rank, self.in_features))
        self.lora_B = nn.Parameter(like.new_zeros(self.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def with_deltas(self, x: Tensor, out: Tensor) -> Tensor:
        """`out`, which the frozen matrix makes of x, with what the deltas add."""
        if not self.enabled:
            return out
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return out + self.gain * F.linear(low, self.lora_B)

    def delta(self) -> Tensor:
        """What is added to the matrix, (outputs, inputs)."""
        return self.gain * (self.lora_B @ self.lora_A)

    def merged(self) -> Tensor:
        """The matrix with its deltas, (outputs, inputs); a quantised one in fp32."""
        raise NotImplementedError


class LoraLinear(LoraMatrix, Linear):
    """Deltas of a plain matrix, which is the base's own."""

    def __init__(self, base: Linear, config: LoraConfig) -> None:
        super().__init__(base.in_features, base.out_features)
        self.weight = base.weight
        self.weight.requires_grad_(False)
        self.add_deltas(config, base.weight)

    def reset_parameters(self) -> None:
        """Nothing: the matrix is the base's, and drawing one only to drop it would cost time."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return self.with_deltas(x, F.linear(x, self.weight))

    def merged(self) -> Tensor:
        """See LoraMatrix."""
        return self.weight + self.delta().to(self.weight.dtype)


class LoraCompressed(LoraMatrix, CompressedMatrix):
    """Deltas of a matrix in codes (Dettmers et al. 2023). The codes are buffers: ZeRO shares them out in no stage."""

    def __init__(self, base: CompressedMatrix, config: LoraConfig) -> None:
        super().__init__(base.compressed)
        self.add_deltas(config, torch.empty(0, device=base.get_buffer("scale").device))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # none of its matrices is the output product
        """(..., inputs) to (..., outputs)."""
        return self.with_deltas(x, CompressedMatrix.forward(self, x))

    def merged(self) -> Tensor:
        """See LoraMatrix."""
        return self.compressed.dequantize() + self.delta()


def add_lora(model: Transformer, config: LoraConfig) -> None:
    """Freeze all weights of `model`, store its blocks' matrices in codes where `config.base` says so, and give the
    target matrices of every block their deltas. The same model gives the same codes: whoever reads a checkpoint, which
    holds the deltas alone, makes the same base again.

    Raises SpecError where the matrices cannot be stored so.
    """
    model.requires_grad_(False)
    if config.base != "fp32":
        # The output product stays: a tied table is there for look-up anyway, and codes beside it would take more.
        kept = [*config.quantization.keep, UNEMBEDDING]
        quantize_model(model, config.base, config.quantization.model_copy(update={"keep": kept}))
    for block in model.blocks:
        for target in config.targets:
            parent = getattr(block, PARENTS.get(target, "feed_forward"))
            base = getattr(parent, target)
            kind = LoraCompressed if isinstance(base, CompressedMatrix) else LoraLinear
            setattr(parent, target, kind(base, config))


def merge_lora(model: Transformer) -> None:
    """Add the deltas to their matrices and leave plain ones; all of a quantised base's in fp32."""
    for parent, name, layer in list(_layers(model)):
        with torch.no_grad(), torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features)
        with torch.no_grad():
            plain.weight = nn.Parameter(layer.merged())
        setattr(parent, name, plain)
    if any(isinstance(module, CompressedMatrix) for module in model.modules()):
        model.blocks = decompress_model(model).blocks.train(model.training)
    model.requires_grad_(True)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model without its deltas, inside the block."""
    layers = [module for module in model.modules() if isinstance(module, LoraMatrix)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def save_adapter(weights: Mapping[str, Tensor], config: LoraConfig, directory: Path, base: str = "") -> None:
    """Write deltas in the format that `peft.PeftModel.from_pretrained` reads.

    Args:
        weights: names as in the model (`blocks.0.attention.query.lora_A`); others are left out.
        base: where the frozen model is, for peft's own use.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {_peft_name(name): w.contiguous() for name, w in weights.items() if ".lora_" in name}
    modules = sorted({name.split(".")[-3] for name in tensors})
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True))
    if config.base != "fp32":
        base_is = {"precision": config.base, "quantization": config.quantization.model_dump(mode="json")}
        (directory / BASE_FILE).write_text(json.dumps(base_is, indent=1, sort_keys=True))


def _peft_name(name: str) -> str:
    """`blocks.3.attention.query.lora_A` as `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`."""
    path, delta = name.rsplit(".", 1)
    number, matrix = path.rpartition("blocks.")[2].split(".", 1)
    theirs = LLAMA_WEIGHTS[f"blocks.*.{matrix}.weight"].replace("*", number)  # every architecture's names
    return f"base_model.model.{theirs.removesuffix('weight')}{delta}.weight"


def _layers(model: Transformer) -> Iterator[tuple[nn.Module, str, LoraMatrix]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, LoraMatrix):
                yield parent, name, child
