"""Reinforcement learning from human or AI feedback: `python -m workloads.ppo ATTEMPT.json` (docs/theory C; Schulman et
al. 2017; Ziegler et al. 2019).

The driver tokenises the prompts (`prepare`) and runs the job's own rollout service (`sidecar`). An iteration publishes
the actor's weights, every rank draws its share of the responses, and all learn from them (alignment/ppo_step.py).
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from escala.contract.checkpoints import file_sha256
from escala.contract.errors import DataError
from escala.contract.records import AttemptSpec
from escala.schema import PpoConfig
from escala.tracking.lineage import fingerprint
from workloads.alignment.rollouts import read_prompts, save_prompts
from workloads.data.cache import is_stored, new_directory
from workloads.model.start import load_tokenizer
from workloads.serving.client import Rollouts
from workloads.sidecar import application_name, rollout_service
from workloads.training import finetune
from workloads.training.entry import Entry, Prepared, WorkerInputs
from workloads.training.run import main

if TYPE_CHECKING:
    from workloads.alignment.ppo_step import PpoStep


def prepare(spec: AttemptSpec, config: PpoConfig) -> Prepared:
    """Prompts, tokenised and stored by content. Raises DataError."""
    tokenizer, file, root = finetune.open_tokenizer(config), Path(config.prompts), Path(spec.data)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model only {config.model.vocab_size}.",
            "Use the tokenizer that the model was trained with.",
        )
    _check_critic(config, tokenizer.fingerprint)
    most = config.context_tokens - config.sampling.max_response_tokens
    prompts = read_prompts(file, tokenizer, most)
    directory = root / "prompts" / fingerprint([file_sha256(file), most, tokenizer.identity])
    if not is_stored(directory):
        with new_directory(directory) as new:
            save_prompts(prompts, new)
    kept = finetune.store_tokenizer(tokenizer, root)
    rewards = [section.model_dump(mode="json") for section in config.rewards]
    fingerprints = {
        "corpus": fingerprint([prompt.tokens for prompt in prompts]),
        "tokenizer": tokenizer.fingerprint,
        "evaluation": fingerprint([rewards, tokenizer.fingerprint]),
    }
    return Prepared(str(directory), kept, fingerprints)


def _check_critic(config: PpoConfig, tokenizer: str) -> None:
    """Raise DataError for a critic that reads other tokens than the actor."""
    start = None if config.critic is None else config.critic.start
    if start is None or start.path is None:
        return
    if load_tokenizer(Path(start.path)).fingerprint != tokenizer:
        raise DataError(
            f"The critic at {start.path} has another tokenizer than the actor.",
            "Train the reward model from the same base, or leave critic.start out.",
        )


def sidecar(inputs: WorkerInputs[PpoConfig]) -> AbstractContextManager[None]:
    """What runs while the workers do: the job's rollout service."""
    return rollout_service(inputs.spec, inputs.config)


def make_step(inputs: WorkerInputs[PpoConfig]) -> PpoStep:
    """One worker's iterations, by the job's rollout service."""
    # Here, since it needs DeepSpeed, which the driver does without.
    from workloads.alignment.ppo_step import PpoStep

    seconds = inputs.config.rollouts.timeout_seconds
    return PpoStep(inputs, Rollouts(application_name(inputs.spec), timeout_seconds=seconds))


ENTRY = Entry(prepare, make_step, sidecar)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
