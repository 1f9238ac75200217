"""What SFT, reward models and DPO share: their tokenizer, their examples made ready and stored by content, their pairs.

Made ready once, by the driver:

    ROOT/tokenizers/HASH/            the start's tokenizer, in Hugging Face's files; HASH of template and ends, too
    ROOT/examples/HASH/              HASH of files, tokenizer and context: {train,held_out}.safetensors, margins.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed
from torch import Tensor

from escala.contract.checkpoints import file_sha256
from escala.contract.errors import DataError
from escala.contract.records import AttemptSpec, write_json
from escala.schema import DpoConfig, FineTuneConfig, RewardTrainingConfig, SftConfig
from escala.tracking.lineage import fingerprint
from workloads.data.batches import Batch
from workloads.data.cache import check_directory, is_stored, new_directory
from workloads.data.chat import ChatTokenizer
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.dialogues import Prompt, Prompted, split
from workloads.data.examples import Draws, Sequences, row_batch
from workloads.data.preferences import Preference, read_preferences
from workloads.model.lora import add_lora
from workloads.model.start import load_tokenizer, new_model, tokenizer_path
from workloads.model.transformer import Transformer
from workloads.training.entry import Prepared, WorkerInputs
from workloads.training.meter import give_back_memory
from workloads.training.task import StepSize

X = TypeVar("X", bound=Prompted)
E = TypeVar("E", RewardTrainingConfig, DpoConfig)
ExamplesTuneConfig = SftConfig | RewardTrainingConfig | DpoConfig
"""The configurations that have examples in files."""
Tokenised = tuple[Sequence[int], Sequence[bool]]


def prepare(
    spec: AttemptSpec,
    config: ExamplesTuneConfig,
    read: Callable[[Path], Iterable[X]],
    tokenise: Callable[[ChatTokenizer, X], list[Tokenised]],
    margin: Callable[[X], float] = lambda example: 0.0,
) -> Prepared:
    """Tokenise the examples, unless the store holds them already.

    An example that is longer than the context is left out, never cut: a cut answer would teach to stop short. How many
    is printed.

    Args:
        read: the examples of a file.
        tokenise: the sequences of one example: one, or chosen and rejected.
        margin: of an example, beside its sequences.

    Raises:
        DataError: a file is unreadable or holds no example that fits; the tokenizer has more tokens than the model.
    """
    tokenizer = open_tokenizer(config)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model only {config.model.vocab_size}.",
            "Use the tokenizer that the model was trained with.",
        )
    data, root = config.data, Path(spec.data)
    files = [Path(data.train), *([Path(data.held_out)] if data.held_out else [])]
    key = [spec.workload, [_sha256(f) for f in files], data.held_out_fraction, config.context_tokens]
    directory = root / "examples" / fingerprint([*key, tokenizer.identity])
    if not is_stored(directory):
        train, held_out = list(read(files[0])), list(read(files[1])) if data.held_out else None
        places = _places(files, [train, held_out or []])
        if held_out is None:
            train, held_out = split(train, data.held_out_fraction)
        with new_directory(directory) as new:
            for name, examples in (("train", train), ("held_out", held_out)):
                fitting = _fitting(
                    name, examples, config.context_tokens, lambda x: _at(places, x, tokenise, tokenizer)
                )
                Sequences.of([s for _, found in fitting for s in found]).save(new / f"{name}.safetensors")
                write_json(new / f"{name}_margins.json", [margin(example) for example, _ in fitting])
    check_directory(directory)
    kept = store_tokenizer(tokenizer, root)
    held_out_hash = file_sha256(directory / "held_out.safetensors")
    fingerprints = {
        "corpus": file_sha256(directory / "train.safetensors"),
        "tokenizer": tokenizer.fingerprint,
        "evaluation": fingerprint([held_out_hash, tokenizer.fingerprint]),
    }
    return Prepared(str(directory), kept, fingerprints)


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise DataError(
            f"{file} can't be read: {error.strerror}.", "Check data.train and data.held_out."
        ) from error


def _places(files: Sequence[Path], examples: Sequence[Sequence[Any]]) -> dict[int, str]:
    """Where each example is from, by its `id`, counted from 1."""
    pairs = zip(files, examples, strict=False)
    return {
        id(x): f"{file}, example {number}" for file, some in pairs for number, x in enumerate(some, start=1)
    }


def _at(
    places: dict[int, str],
    example: X,
    tokenise: Callable[[ChatTokenizer, X], list[Tokenised]],
    tokenizer: ChatTokenizer,
) -> list[Tokenised]:
    """`tokenise`, its errors with the example's place."""
    try:
        return tokenise(tokenizer, example)
    except DataError as error:
        raise DataError(f"{places[id(example)]}: {error.message}", error.hint) from error


def _fitting(
    name: str, examples: Sequence[X], context: int, tokenise: Callable[[X], list[Tokenised]]
) -> list[tuple[X, list[Tokenised]]]:
    """The examples whose sequences all fit in a context, tokenised."""
    tokenised = [(example, tokenise(example)) for example in examples]
    fitting = [(x, found) for x, found in tokenised if all(len(ids) - 1 <= context for ids, _ in found)]
    left_out = len(tokenised) - len(fitting)
    print(f"{name}: {len(fitting)} examples, {left_out} longer than {context} tokens left out", flush=True)
    if not fitting:
        raise DataError(f"No {name} example fits in {context} tokens.", "Raise training.context_tokens.")
    return fitting


def open_tokenizer(config: FineTuneConfig) -> ChatTokenizer:
    """The tokenizer that the configuration names, or the one that stands with its start; its ends of generation are the
    start's, too. Raises DataError.
    """
    start = None if config.start is None or config.start.path is None else Path(config.start.path)
    if config.tokenizer is not None:
        return load_chat_tokenizer(Path(config.tokenizer), None if start is None else tokenizer_path(start))
    if start is None:
        raise DataError("There is no tokenizer.", "Set tokenizer, or start from a model that has one.")
    return load_tokenizer(start)


def answered(tokenizer: ChatTokenizer, prompt: Prompt, answer: str) -> Tokenised:
    """A prompt with its answer, as SFT and DPO learn it: token ids, and which are the answer's, its end included."""
    return tokenizer.sequence(prompt, answer)


def store_tokenizer(tokenizer: ChatTokenizer, root: Path) -> Path:
    """The directory in the store `root` that holds `tokenizer`, written where it is not there.

    Raises DataError where it is damaged.
    """
    kept = root / "tokenizers" / tokenizer.identity
    if not is_stored(kept):
        with new_directory(kept) as new:
            tokenizer.save(new)
    check_directory(kept)
    return kept


def prepare_pairs(
    spec: AttemptSpec,
    config: ExamplesTuneConfig,
    tokens: Callable[[ChatTokenizer, Prompt, str], Tokenised],
) -> Prepared:
    """Preferences as pairs of sequences: chosen, rejected, chosen, ... Raises DataError."""

    def tokenise(tokenizer: ChatTokenizer, one: Preference) -> list[Tokenised]:
        return [tokens(tokenizer, one.prompt, text) for text in (one.chosen, one.rejected)]

    return prepare(spec, config, read_preferences, tokenise, lambda one: one.margin)


def build_model(config: FineTuneConfig) -> Transformer:
    """The start, with its deltas where the configuration has LoRA; in fp32."""
    model = new_model(config)
    model.activation_checkpointing = config.training.activation_checkpointing
    if config.lora is not None:
        add_lora(model, config.lora)
        if config.lora.base != "fp32":
            give_back_memory()  # what quantising has freed
    return model


@dataclass(frozen=True)
class PairedSequences:
    """Pairs of sequences, chosen then rejected, and their margins."""

    sequences: Sequences
    margins: list[float]

    @classmethod
    def load(cls, directory: Path, split: str) -> PairedSequences:
        """One side of what `prepare_pairs` stored."""
        margins = json.loads((directory / f"{split}_margins.json").read_text())
        return cls(Sequences.load(directory / f"{split}.safetensors"), margins)

    def __len__(self) -> int:
        return len(self.margins)

    @cached_property
    def tokens(self) -> Any:
        """Of each pair, its two sequences together."""
        return self.sequences.lengths.reshape(-1, 2).sum(axis=1)

    def rows(self, pairs: Sequence[int]) -> list[int]:
        """The sequences of pairs: all chosen ones, then all rejected ones."""
        return [2 * pair for pair in pairs] + [2 * pair + 1 for pair in pairs]


class PairBatches(Generic[E]):
    """The part of a training task that cuts pairs into steps (training.task.Task). Units are pairs; a micro-batch has
    two rows a pair, the chosen ones first.
    """

    def __init__(self, inputs: WorkerInputs[E]) -> None:
        self.config: E = inputs.config
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        directory = Path(inputs.prepared)
        check_directory(directory)
        self.train, self.held_out = (
            PairedSequences.load(directory, "train"),
            PairedSequences.load(directory, "held_out"),
        )
        training = self.config.training
        self.draws = Draws(len(self.train), training.batch_sequences, training.seed)

    def size(self, step: int) -> StepSize:
        """See Task."""
        pairs = self.draws.step(step)
        return StepSize(len(pairs), int(self.train.tokens[pairs].sum()))

    def micro_batch(self, step: int, micro: int) -> Batch:
        """See Task."""
        size = self.config.micro_batch_sequences
        return self.batch(self.train, self.draws.micro_batch(step, micro, self.rank, self.ranks, size))

    def batch(self, pairs: PairedSequences, chosen: Sequence[int]) -> Batch:
        """The rows of the chosen pairs, as inputs and targets."""
        return row_batch(pairs.sequences, [[row] for row in pairs.rows(chosen)])


def halves(scores_2B: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected of a pair batch's rows."""
    chosen_B, rejected_B = scores_2B.chunk(2)
    return chosen_B, rejected_B
