"""A model in fewer bits within a loss budget (docs/theory E.2 to E.6): `python -m workloads.compress ATTEMPT.json`.
Reads top to bottom.

The driver reads the held-out text; one worker measures: what each matrix holds; uniform widths; what each group of
matrices alone loses; and for each budget the cheapest widths that keep it, measured. The smallest budget's model is
written as the job's checkpoint.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from escala.contract.errors import CheckpointError, DataError
from escala.contract.records import read_json
from escala.schema import CompressConfig, DataConfig, TokenizerConfig
from escala.storage.checkpoints import open_checkpoints
from escala.tracking.lineage import fingerprint
from escala.tracking.lineage.lifecycle import LiveAttempt, RunSummary, run_attempt
from workloads.data.prepared import PreparedData
from workloads.data.shards import prepare as prepare_tokens
from workloads.model.start import find_checkpoint, load_model, load_tokenizer
from workloads.training.driver import HUGE_PAGES, start_workers
from workloads.training.failures import NodeWatch, classify
from workloads.training.finetune import store_tokenizer
from workloads.training.run import keep_tokenizer

TOKENS = "tokens.pt"


def main(arguments: list[str]) -> int:
    """Run one attempt; returns the process's exit code."""
    return run_attempt(arguments, compress, partial(classify, nodes=None), summary)


def compress(attempt: LiveAttempt) -> None:
    """Prepare the held-out tokens, and start the worker."""
    import ray

    spec = attempt.spec
    config = attempt.open(CompressConfig.model_validate)
    tokens_NT1, tokenizer, fingerprints = held_out(config, Path(spec.data))
    attempt.reads(fingerprints)
    torch.save(tokens_NT1, Path(spec.directory) / TOKENS)
    keep_tokenizer(tokenizer, open_checkpoints(spec.checkpoints), None)
    ray.init(address="auto", log_to_driver=True, namespace="escala")
    attempt.classify = partial(classify, nodes=NodeWatch())
    arguments = {"spec": spec, "run_id": attempt.run[1], "fingerprints": fingerprints}
    start_workers(measure, arguments, config.resources, spec.directory, {"GLIBC_TUNABLES": HUGE_PAGES})


def held_out(config: CompressConfig, root: Path) -> tuple[torch.Tensor, Path | None, dict[str, str]]:
    """(tokens_NT1, the directory of the model's tokenizer, fingerprints) of the held-out text.

    Raises DataError where there is none, or too little of it; CheckpointError.
    """
    start = Path(str(config.start.path))
    data = config.data or (None if config.text else _own_data(start))
    if data is not None and data.recall is not None:
        prepared = prepare_tokens(data, root, config.context, partial(print, flush=True))
        return _cut(prepared, config), None, _fingerprints(prepared)
    tokenizer = load_tokenizer(start)
    kept = store_tokenizer(tokenizer, root)
    if config.text is not None:
        ids = tokenizer.encode(Path(config.text).read_text("utf-8"))
        windows = (len(ids) - 1) // config.context
        wanted = (config.tokens + config.check_tokens) // config.context
        if windows < 2:
            raise DataError(
                f"{config.text} has {len(ids)} tokens: not two sequences of {config.context}.",
                "Give more text, or a shorter context_tokens.",
            )
        taken = torch.tensor(ids[: min(wanted, windows) * config.context + 1])
        read = fingerprint([ids, tokenizer.fingerprint])
        found = {"corpus": read, "tokenizer": tokenizer.fingerprint, "evaluation": read}
        return taken.unfold(0, config.context + 1, config.context), kept, found
    own = TokenizerConfig(path=str(kept / "tokenizer.json"))
    data = (data or DataConfig()).model_copy(update={"tokenizer": own})
    prepared = prepare_tokens(data, root, config.context, partial(print, flush=True))
    return _cut(prepared, config), kept, _fingerprints(prepared)


def _own_data(start: Path) -> DataConfig:
    """The corpora of the run whose checkpoint stands at `start`. Raises DataError where there are none."""
    found = find_checkpoint(start)
    plain = None if found is None else found.part("config", dict).get("data")
    if not isinstance(plain, dict) or "corpora" not in plain:
        raise DataError(
            f"{start} does not say on what text its loss is measured.",
            "Give --text FILE, or corpora: --set 'data.corpora=[{kind: python_source}]'.",
        )
    return DataConfig(**plain)


def _cut(prepared: PreparedData, config: CompressConfig) -> torch.Tensor:
    found = prepared.held_out(config.context, config.tokens + config.check_tokens)
    if len(found) < 2:
        raise DataError(
            f"The held-out text has one sequence of {config.context} tokens, and two texts are measured.",
            "Raise data.held_out_fraction, give more text, or a shorter context_tokens.",
        )
    return found


def _fingerprints(prepared: PreparedData) -> dict[str, str]:
    return {
        "corpus": prepared.corpus_fingerprint,
        "tokenizer": prepared.tokenizer_fingerprint,
        "evaluation": prepared.evaluation_fingerprint,
    }


def measure(arguments: dict[str, Any]) -> None:
    """The one worker."""
    from workloads.training.compression import Compression
    from workloads.training.device import device_of, set_up_torch
    from workloads.training.report import Reporter

    spec = arguments["spec"]
    config = CompressConfig(**spec.config)
    set_up_torch(config.resources)
    device = device_of(config.resources)
    reporter = Reporter(spec, arguments["run_id"])
    tokens_NT1 = torch.load(Path(spec.directory) / TOKENS, weights_only=True)
    model = load_model(Path(str(config.start.path)))
    if model.config != config.model:
        raise CheckpointError(
            f"{config.start.path} holds another model than when the job was queued", "submit it again"
        )
    job = Compression(
        config, spec, model.to(device), tokens_NT1.to(device), reporter, arguments["fingerprints"]
    )
    try:
        job.run()
    finally:
        reporter.close()


def summary(attempt: LiveAttempt) -> RunSummary:
    """What the worker left."""
    try:
        facts: dict[str, Any] = read_json(attempt.files.facts)
    except (FileNotFoundError, ValueError):
        facts = {}
    values = {
        "wall_seconds": time.time() - attempt.started_at,
        "workers": 1,
        "context_tokens": facts.get("context_tokens"),
        "held_out_loss_nats": facts.get("held_out_loss_nats"),
        "initial_held_out_loss_nats": facts.get("initial_held_out_loss_nats"),
        "measures": facts.get("measures"),
    }
    return RunSummary({k: v for k, v in values.items() if v is not None}, checkpoint=facts.get("checkpoint"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
