"""A job's newest checkpoint as files that others open: `python -m workloads.export CHECKPOINTS DIRECTORY [--adapter |
--gguf=PRECISION]`.

A whole model in Hugging Face's layout with its tokenizer and chat template, a LoRA run's deltas merged, a compressed
one's matrices dequantised; the same as a GGUF file, in codes; a LoRA run's deltas alone in peft's format; a reward
model's trunk with its head in a file beside it.
"""

from __future__ import annotations

import shutil
import sys
import uuid
from pathlib import Path
from typing import get_args

from escala.contract.errors import EscalaError, NotFoundError, SpecError
from escala.contract.files import rename_whole
from escala.schema.compression import BITS, Precision, QuantizationConfig
from escala.storage.checkpoints import Checkpoint
from workloads.model.compression.plan import quantize_model
from workloads.model.compression.saved import is_compressed
from workloads.model.gguf_out import save_gguf
from workloads.model.huggingface import save_pretrained
from workloads.model.lora import save_adapter
from workloads.model.start import (
    checkpoint_config,
    checkpoint_model,
    find_checkpoint,
    has_scalar_head,
    load_compressed,
    load_tokenizer,
)
from workloads.model.weights import load_weights
from workloads.rewards.reward_model import load_reward_model, save_reward_model

GGUF_FILE = "model.gguf"


def export(checkpoints: Path, to: Path, adapter: bool = False, gguf: Precision | None = None) -> None:
    """Write the newest good checkpoint of `checkpoints` into the directory `to`, all or nothing.

    Args:
        adapter: a LoRA run's deltas alone.
        gguf: a precision: one GGUF file in place of safetensors, what is not in codes yet quantised by int8 or int4.

    Raises NotFoundError where there is none, SpecError where `adapter` is asked of a run without LoRA, CheckpointError.
    """
    found = find_checkpoint(checkpoints)
    if found is None:
        raise NotFoundError(f"there is no checkpoint in {checkpoints}", "wait for the job's first one")
    partial = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}")
    try:
        _write(found, partial, adapter, gguf)
        rename_whole(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(found: Checkpoint, to: Path, adapter: bool, gguf: Precision | None) -> None:
    tokenizer = load_tokenizer(Path(found.store.address))
    lora = None if is_compressed(found) else checkpoint_config(found).adapter
    if adapter:
        if lora is None:
            raise SpecError("this run trained whole matrices, no deltas", "export it without --adapter")
        start = checkpoint_config(found).starts_from
        save_adapter(load_weights(found), lora, to, (start and start.path) or "")
    elif gguf is not None:
        if has_scalar_head(found):
            raise SpecError("GGUF has no place for a reward model's head", "export it without --gguf")
        model = load_compressed(Path(found.address))
        if gguf in BITS:
            quantize_model(model, gguf, QuantizationConfig())
        to.mkdir(parents=True, exist_ok=True)
        save_gguf(model, to / GGUF_FILE, tokenizer)
    elif has_scalar_head(found):
        save_reward_model(load_reward_model(Path(found.address))[0], tokenizer, to)
        return
    else:
        save_pretrained(checkpoint_model(found), to, tokenizer.end_of_text)
    tokenizer.save(to)


def main(arguments: list[str]) -> int:
    """Export; returns the process's exit code. An error is printed as it is."""
    checkpoints, to, *flags = arguments
    try:
        gguf: Precision | None = next((one for one in get_args(Precision) if f"--gguf={one}" in flags), None)
        export(Path(checkpoints), Path(to), adapter="--adapter" in flags, gguf=gguf)
    except EscalaError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
