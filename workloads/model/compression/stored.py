"""A model that is read alone, a judge's or a reward model's, in the precision that its section says."""

from __future__ import annotations

import torch

from escala.schema.compression import BITS, StoredWeights
from workloads.model.compression.plan import quantize_model
from workloads.model.transformer import Transformer


def store_weights(model: Transformer, stored: StoredWeights) -> None:
    """Give `model` the precision that `stored` says, in place. Matrices in codes are made whole for each product, so a
    pass over many tokens takes little longer, and memory is what they save. Raises as `quantize_model`.
    """
    if stored.precision in BITS:
        quantize_model(model, stored.precision, stored.quantization)
    elif stored.precision == "bf16":
        model.to(torch.bfloat16)
