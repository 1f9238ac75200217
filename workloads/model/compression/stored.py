"""A model that is read alone, a judge's or a reward model's, in the precision that its section says."""

from __future__ import annotations

import torch

from escala.schema.compression import BITS, StoredWeights
from workloads.data.chat import ChatTokenizer
from workloads.model.compression.activation_aware import calibration_of
from workloads.model.compression.plan import quantize_model
from workloads.model.transformer import Transformer


def store_weights(model: Transformer, stored: StoredWeights, tokenizer: ChatTokenizer) -> None:
    """Give `model` the precision that `stored` says, in place. Matrices in codes are made whole for each product, so a
    pass over many tokens takes little longer, and memory is what they save. Raises as `quantize_model`
    and `calibration_tokens`.
    """
    if stored.precision in BITS:
        calibration_BT = calibration_of(stored, tokenizer, model.config.max_context_tokens)
        quantize_model(model, stored.precision, stored.quantization, calibration_BT)
    elif stored.precision == "bf16":
        model.to(torch.bfloat16)
