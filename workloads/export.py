"""Export: `python -m workloads.export CHECKPOINT --to DIR --data STORE`; started by `escala export`.

A run's checkpoint and its tokenizer become a directory that transformers and vLLM open. The last line on stdout is
JSON: {"path": DIR}, or {"message": ..., "hint": ...} of an error, whose exit code the process ends with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from escala.errors import CheckpointError, DataError, EscalaError, SpecError
from escala.manifests import Checkpoint, read_checkpoint, verify
from workloads.config import ModelConfig

if TYPE_CHECKING:
    from workloads.data.chat import ChatTokenizer
    from workloads.model.transformer import Transformer


def main(arguments: list[str]) -> int:
    """Export one checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m workloads.export")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="a new or empty directory")
    parser.add_argument("--data", type=Path, required=True, help="the store of tokenizers (HOME/data)")
    given = parser.parse_args(arguments)
    try:
        written = export_checkpoint(given.checkpoint, given.to, given.data)
    except EscalaError as error:
        print(json.dumps({"message": error.message, "hint": error.hint}), flush=True)
        return error.exit_code
    print(json.dumps({"path": str(written)}), flush=True)
    return 0


def export_checkpoint(path: Path, to: Path, data: Path) -> Path:
    """Write the model (fp32) and the tokenizer of the checkpoint `path` into the directory `to`, all or nothing.

    Args:
        to: must be absent or empty.
        data: the store that `workloads.data.shards` writes; the tokenizer is found there by its fingerprint.

    Raises:
        SpecError: `to` is not empty.
        CheckpointError: the checkpoint is damaged, or its model has no form in Hugging Face's formats.
        DataError: the store has no such tokenizer.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise SpecError(f"{to} exists and is not an empty directory", "give --to a new directory")
    from workloads.model.huggingface import save_pretrained

    checkpoint = read_checkpoint(path)
    verify(checkpoint)
    model = restore(checkpoint)
    tokenizer = find_tokenizer(data, checkpoint.manifest["fingerprints"]["tokenizer"])
    partial = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}")
    try:
        save_pretrained(model, partial, tokenizer.end_of_text)
        tokenizer.save(partial)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return to


def restore(checkpoint: Checkpoint) -> Transformer:
    """The checkpoint's model, fp32, on the CPU. Raises CheckpointError."""
    import torch

    from workloads.model.transformer import Transformer
    from workloads.training.checkpoint import load_weights

    config = ModelConfig(**checkpoint.manifest["config"]["model"])
    with torch.device("meta"):
        model = Transformer(config)
    try:
        model.load_state_dict(load_weights(checkpoint), assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {checkpoint.path} does not fit its model: {error}") from error
    return model


def find_tokenizer(data: Path, fingerprint: str) -> ChatTokenizer:
    """The tokenizer of a store that has this fingerprint. Raises DataError."""
    from workloads.data.chat import load_chat_tokenizer

    for described in sorted((data / "prepared").glob("*.json")):
        record = json.loads(described.read_text())
        if record["tokenizer_fingerprint"] != fingerprint:
            continue
        file = data / record["tokenizer"]
        if file.is_file():
            tokenizer = load_chat_tokenizer(file)
            if tokenizer.fingerprint == fingerprint:
                return tokenizer
    raise DataError(
        f"the tokenizer {fingerprint[:12]} that the checkpoint was trained with is not in {data}",
        "prepare its data again (escala jobs resume), or give the home that it was trained in (ESCALA_HOME)",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
