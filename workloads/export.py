"""A job's newest checkpoint as files that others open: `python -m workloads.export CHECKPOINTS DIRECTORY [--adapter]`.

A whole model in Hugging Face's layout with its tokenizer and chat template, a LoRA run's deltas merged, a compressed
one's matrices dequantised; its deltas alone in peft's format; a reward model's trunk with its head in a file beside it.
"""

from __future__ import annotations

import shutil
import sys
import uuid
from pathlib import Path

from escala.contract.errors import EscalaError, NotFoundError, SpecError
from escala.contract.files import rename_whole
from escala.storage.checkpoints import Checkpoint
from workloads.model.compression.saved import is_compressed
from workloads.model.huggingface import save_pretrained
from workloads.model.lora import save_adapter
from workloads.model.start import (
    checkpoint_config,
    checkpoint_model,
    find_checkpoint,
    has_scalar_head,
    load_tokenizer,
)
from workloads.model.weights import load_weights
from workloads.rewards.reward_model import load_reward_model, save_reward_model


def export(checkpoints: Path, to: Path, adapter: bool = False) -> None:
    """Write the newest good checkpoint of `checkpoints` into the directory `to`, all or nothing.

    Raises NotFoundError where there is none, SpecError where `adapter` is asked of a run without LoRA, CheckpointError.
    """
    found = find_checkpoint(checkpoints)
    if found is None:
        raise NotFoundError(f"there is no checkpoint in {checkpoints}", "wait for the job's first one")
    partial = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}")
    try:
        _write(found, partial, adapter)
        rename_whole(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(found: Checkpoint, to: Path, adapter: bool) -> None:
    tokenizer = load_tokenizer(Path(found.store.address))
    lora = None if is_compressed(found) else checkpoint_config(found).adapter
    if adapter:
        if lora is None:
            raise SpecError("this run trained whole matrices, no deltas", "export it without --adapter")
        start = checkpoint_config(found).starts_from
        save_adapter(load_weights(found), lora, to, (start and start.path) or "")
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
        export(Path(checkpoints), Path(to), adapter="--adapter" in flags)
    except EscalaError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
