"""How fast this process trains small models, under the load that there is: `python -m workloads.speed JSON`.

JSON: {"models": [section `model`, ...], "batch_sequences": B, "seconds": of each}. Prints one line of JSON:
{"flops_per_second": [of each], "share": of a core that this process had}.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from escala.schema import ModelConfig, OptimizerConfig
from escala.schema.flops import flops_per_token
from workloads.model.transformer import Transformer
from workloads.training.loss import token_loss
from workloads.training.optimizer import adamw, parameter_groups

WARM_UP_STEPS = 3


def speed(model: dict[str, Any], sequences: int, seconds: float) -> float:
    """FLOP/s of training steps on random tokens."""
    config = ModelConfig(**model)
    network, context = Transformer(config), config.max_context_tokens
    optimizer = adamw(OptimizerConfig(), parameter_groups(network, 0.1))
    tokens_BT1 = torch.randint(0, config.vocab_size, (sequences, context + 1))
    steps = 0
    for made in range(1_000_000):
        if made == WARM_UP_STEPS:
            began = time.perf_counter()
        if made > WARM_UP_STEPS and time.perf_counter() - began > seconds:
            break
        loss, count = token_loss(network(tokens_BT1[:, :-1]), tokens_BT1[:, 1:])
        torch.autograd.backward(loss / count)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += made >= WARM_UP_STEPS
    flops = flops_per_token(config, context).total * sequences * context * steps
    return flops / (time.perf_counter() - began)


def main(arguments: list[str]) -> int:
    """See the module."""
    asked = json.loads(arguments[0])
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    found = [speed(model, asked["batch_sequences"], asked["seconds"]) for model in asked["models"]]
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    print(json.dumps({"flops_per_second": found, "share": share}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
