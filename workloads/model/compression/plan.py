"""Which matrices of a model an engine, a judge, a reward model or LoRA's base stores in codes (docs/theory E.6)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from escala.contract.errors import SpecError
from escala.schema.compression import MatrixChoice, Precision, QuantizationConfig, is_kept
from workloads.model.compression.activation_aware import scale_by_activations
from workloads.model.compression.layers import UNEMBEDDING, CompressedMatrix, compress_model, matrices
from workloads.model.transformer import Transformer

OUTPUT_PRODUCT = MatrixChoice(bits=8)
"""Of the output product under int8 and int4: a scale for each token. A tied embedding's table stays for look-up."""


def quantize_model(
    model: Transformer,
    precision: Precision,
    quantization: QuantizationConfig,
    calibration_BT: Tensor | None = None,
) -> None:
    """Store the matrices of `model`'s blocks in codes of `precision` (int8 or int4), and its output product in INT8, in
    place. Those that are compressed already stay as they are. The same model gives the same codes, always.

    Args:
        calibration_BT: tokens of `quantization.calibration` (`activation_aware.calibration_tokens`): the weights are
            scaled by what the matrices read of them. None: they are not scaled.

    Raises SpecError where a pattern of `quantization.keep` names no matrix, where the group does not divide a matrix's
    inputs, and for a calibration of a model of which something is compressed already.
    """
    chosen = choices(model, precision, quantization)
    if calibration_BT is not None:
        if any(isinstance(module, CompressedMatrix) for module in model.modules()):
            raise SpecError(
                "quantization.calibration scales weights before they are rounded; this model's are in codes already.",
                "Leave it out, or start from the model's own weights.",
            )
        scale_by_activations(model, calibration_BT, quantization.choice(precision))
    compress_model(model, chosen)


def choices(
    model: Transformer, precision: Precision, quantization: QuantizationConfig
) -> dict[str, MatrixChoice]:
    """Name -> how it is stored, of every matrix of `model` that is not compressed yet and is not kept."""
    weights = matrices(model)
    _check_patterns(model, weights, quantization.keep)
    chosen = quantization.choice(precision)
    found: dict[str, MatrixChoice] = {}
    for name, weight_OI in weights.items():
        if is_kept(name, quantization.keep):
            continue
        if name == UNEMBEDDING:
            found[name] = OUTPUT_PRODUCT
            continue
        found[name], inputs = chosen, weight_OI.shape[1]
        if chosen.group is not None and inputs % chosen.group:
            raise SpecError(
                f"quantization.group {chosen.group} does not divide the {inputs} inputs of {name}.",
                f"Give a group that does, or keep the matrix as it is: quantization: {{keep: [{_pattern(name)}]}}.",
            )
    return found


def _check_patterns(model: Transformer, weights: Mapping[str, Tensor], keep: list[str]) -> None:
    stored = [name for name, module in model.named_modules() if isinstance(module, CompressedMatrix)]
    names = [*weights, *stored]
    for pattern in keep:
        if not any(is_kept(name, [pattern]) for name in names):
            raise SpecError(
                f"quantization.keep: {pattern} matches no matrix of the model.",
                f"Its matrices are {', '.join(names[:8])}, ..., {names[-1]}.",
            )


def _pattern(name: str) -> str:
    """Of the matrices of the same kind in all blocks: `*.feed_forward.down`."""
    return f'"*.{name.split(".", 2)[2]}"'
