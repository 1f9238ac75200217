"""What each rank of test_spectrum_zero.py does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from escala.schema import ModelConfig, TrainingConfig
from workloads.model.moe import mixtures
from workloads.model.transformer import Transformer
from workloads.training import zero
from workloads.training.spectrum import matrix_figures, spectrum_metrics, summarised

MODEL = ModelConfig(
    vocab_size=50, n_layers=1, d_model=40, n_heads=2, d_ff=48, max_context_tokens=8,
    moe={"experts": 3, "chosen": 1, "d_ff": 20, "capacity_factor": None},
)  # fmt: skip


def scenario(_: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Transformer(MODEL)
    whole = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    engine = zero.make_engine(model, TrainingConfig(zero_stage=3, zero_param_persistence_threshold=0), 1, 1)
    engine(torch.arange(8)[None] + 8 * dist.get_rank())
    found = spectrum_metrics(engine, 5)
    names = [name for name, weight in whole.items() if weight.dim() > 1 and "router" not in name]
    plain = [
        matrix_figures(name, weight_OI)
        for name in names
        for weight_OI in (whole[name] if whole[name].dim() == 3 else whole[name][None])
    ]
    load_E = mixtures(engine.module)[0].routing.load_E.double()  # type: ignore[union-attr]
    dist.all_reduce(load_E)
    entropy_E = torch.tensor(
        [[f.values[0] for f in plain if f.parameter.endswith(s)] for s in (".gate", ".up", ".down")]
    )
    active = float((load_E * entropy_E.mean(0)).sum() / load_E.sum())
    return {"found": found, "plain": summarised(plain), "active": active}
