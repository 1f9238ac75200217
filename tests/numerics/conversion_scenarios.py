"""What each rank of test_conversion.py does: whole runs of `workloads.convert`, from a start in the directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from escala.contract.records import AttemptFiles, AttemptSpec
from escala.schema import ConvertConfig
from escala.storage.checkpoints import latest, open_checkpoints
from workloads.convert import make_step
from workloads.model.start import load_model
from workloads.model.weights import load_weights
from workloads.training.entry import WorkerInputs
from workloads.training.loop import RunLoop


def config(directory: Path, **changes: Any) -> dict[str, Any]:
    """Of a conversion of the start in `directory`, as plain data."""
    plain = {
        "start": {"path": str(directory / "start")},
        "attention": "hybrid",
        "window_tokens": 16,
        "features": {"kind": "learned", "count": 8},
        "data": {"corpora": [{"kind": "files", "root": str(directory / "text")}], "held_out_fraction": 0.2},
        "training": {
            "steps": 6,
            "context_tokens": 48,
            "batch_sequences": 4,
            "micro_batch_sequences": 2,
            "evaluation_tokens": 480,
            "checkpoint_every_steps": 3,
            "matmul_precision": "highest",
            "zero_stage": 0,
            "zero_param_persistence_threshold": 0,
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        },
        "resources": {"workers": 2},
    }
    for key, value in changes.items():
        plain[key] = {**plain[key], **value} if isinstance(plain.get(key), dict) else value
    return ConvertConfig(**plain).model_dump(mode="json")


def run(directory: Path, name: str, plain: dict[str, Any], source: str | None = None) -> dict[str, Any]:
    """Train, in `directory`/`name`; the facts of its record."""
    files = AttemptFiles(directory / name)
    files.directory.mkdir(exist_ok=True)
    spec = AttemptSpec(
        "job", 1, "t", "convert", "workloads.convert", plain, str(files.directory),
        str(files.directory / "checkpoints"), str(directory / "data"), f"spool:{files.spool}", "tests",
    )  # fmt: skip
    prepared = (directory / "prepared").read_text()
    this = RunLoop(WorkerInputs(spec, prepared, source, "run", {"tokenizer": "t"}), make_step)
    this.run()
    this.close()
    dist.barrier()
    found: dict[str, Any] = json.loads(files.facts.read_text())
    return found


def stages(directory: Path) -> dict[str, Any]:
    """One conversion under every ZeRO stage, and on from the middle of the third."""
    found: dict[str, Any] = {}
    for stage in range(4):
        found[f"zero{stage}"] = run(
            directory, f"zero{stage}", config(directory, training={"zero_stage": stage})
        )
    plain = config(directory, training={"zero_stage": 3})
    middle = directory / "zero3" / "checkpoints" / "step-00000003"
    found["resumed"] = run(directory, "resumed", plain, str(middle))
    if dist.get_rank():
        return found
    newest, _ = latest(open_checkpoints(directory / "zero3" / "checkpoints"))
    assert newest is not None
    found["saved"] = sorted(load_weights(newest))
    exact, model = (load_model(path) for path in (directory / "start", Path(newest.store.address)))
    found["kind"] = model.config.attention.kind
    found["same"] = {
        n: torch.equal(p, dict(exact.named_parameters())[n])
        for n, p in model.named_parameters()
        if ".attention." not in n
    }
    return found
