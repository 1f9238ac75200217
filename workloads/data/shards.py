"""`prepare`: text to token files, each corpus once. What it makes is named by its content:

    ROOT/tokenizers/HASH/            HASH of the training documents, the vocabulary size and the sample's size:
                                     tokenizer.json
    ROOT/tokens/HASH/                HASH of a corpus's documents, split and tokenizer: {train,held_out}.bin
    ROOT/prepared/HASH.json          HASH of the two above and the weights: what PreparedData.open reads

Everything is written under another name and renamed, so two at once do the work twice and damage nothing; and with its
hashes (data/cache.py), which are compared when it is read.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tokenizers

from escala.contract.errors import DataError
from escala.schema import DataConfig, TextCorpus
from escala.tracking.lineage import fingerprint
from workloads.data.cache import TokenDirectory, TokenWriter, check_directory, is_stored, new_directory
from workloads.data.corpus import Document, read_documents
from workloads.data.prepared import PreparedData, check, write_record
from workloads.data.recall_shards import prepare_recall
from workloads.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer, wrap

__all__ = ["PreparedData", "check", "prepare"]

BATCH_DOCUMENTS = 256  # texts that the tokenizer gets at a time


@dataclass(frozen=True)
class Scan:
    """What a first reading of a corpus finds: its identity, and what sampling needs."""

    fingerprint: str  # of all documents in order, with their split
    train_order: array[int]  # a hash of each training document
    train_characters: array[int]


def prepare(
    config: DataConfig, root: Path, context_tokens: int, report: Callable[[str], None] = lambda line: None
) -> PreparedData:
    """Tokenise what `config` names, unless `root` holds it already, and open it.

    Every corpus is read once to learn its content (hashing only); only new content is tokenised.

    Args:
        context_tokens: a corpus with less training or held-out text than one sequence is refused.
        report: is told what is being done, a line at a time.

    Raises:
        DataError: a corpus is empty, unreadable or too short; a tokenizer is none; a store is damaged.
    """
    if config.recall is not None:
        return prepare_recall(config.recall, root, report)
    scans = [_scan(corpus, number, config) for number, corpus in enumerate(config.texts)]
    tokenizer_path, tokenizer = _tokenizer(config, scans, root, report)
    directories = [
        _tokenise(corpus, scan, config, tokenizer, root, report)
        for corpus, scan in zip(config.texts, scans, strict=True)
    ]
    prepared = PreparedData.open(_describe(config, directories, tokenizer, tokenizer_path, root))
    prepared.held_out(context_tokens, context_tokens)
    for number, windows in enumerate(prepared.windows(context_tokens)):
        if windows == 0:
            raise DataError(
                f"data.corpora[{number}] has fewer training tokens than one sequence of {context_tokens}.",
                "Give more text, or shorten training.context_tokens.",
            )
    report(
        f"data: {prepared.train_tokens:,} training and {prepared.held_out_tokens:,} held-out tokens, "
        f"{prepared.held_out_bytes_per_token:.2f} bytes each"
    )
    return prepared


def _scan(corpus: TextCorpus, number: int, config: DataConfig) -> Scan:
    """Read a corpus without tokenising it."""
    identity = hashlib.sha256()
    order, characters = array("Q"), array("Q")
    for document in read_documents(corpus, config):
        identity.update(document.digest + bytes([document.held_out]))
        if not document.held_out:
            order.append(_sample_order(document))
            characters.append(len(document.text))
    if not order:
        raise DataError(
            f"data.corpora[{number}] ({corpus.kind}) has no training document.",
            "Check its files and its text key, or lower data.held_out_fraction.",
        )
    return Scan(identity.hexdigest(), order, characters)


def _sample_order(document: Document) -> int:
    """Documents below a threshold of this number are the tokenizer's sample. Other bytes than the split's."""
    return int.from_bytes(document.digest[8:16], "big")


def _tokenizer(
    config: DataConfig, scans: list[Scan], root: Path, report: Callable[[str], None]
) -> tuple[Path, TextTokenizer]:
    """The tokenizer given, the one trained on this text before, or a new one; always a file of the store."""
    wanted = config.tokenizer
    if wanted.path is not None:
        given = load_tokenizer(Path(wanted.path))
        directory = root / "tokenizers" / fingerprint([given.fingerprint])
        return _keep_tokenizer(directory, lambda: given), given
    key = [
        [scan.fingerprint for scan in scans],
        wanted.vocab_size,
        wanted.train_characters,
        tokenizers.__version__,
    ]
    directory = root / "tokenizers" / fingerprint(key)

    def train() -> TextTokenizer:
        report(
            f"training a tokenizer of {wanted.vocab_size} tokens on {wanted.train_characters:,} characters"
        )
        return wrap(train_tokenizer(_sample(config, scans), wanted.vocab_size), str(directory))

    path = _keep_tokenizer(directory, train)
    return path, load_tokenizer(path)


def _keep_tokenizer(directory: Path, make: Callable[[], TextTokenizer]) -> Path:
    """The tokenizer.json in a directory of the store, made where it is missing. Raises DataError for a damaged one."""
    if not is_stored(directory):
        with new_directory(directory) as new:
            text = make().tokenizer.to_str(pretty=True)
            (new / "tokenizer.json").write_text(text, encoding="utf-8")
    check_directory(directory)
    return directory / "tokenizer.json"


def _sample(config: DataConfig, scans: list[Scan]) -> Iterator[str]:
    """`train_characters` of the training documents, chosen by content hash, spread over every corpus."""
    pairs = sorted(
        pair for scan in scans for pair in zip(scan.train_order, scan.train_characters, strict=True)
    )
    left, threshold = config.tokenizer.train_characters, 0
    for threshold, characters in pairs:  # noqa: B007  the last one is used below
        left -= characters
        if left <= 0:
            break
    left = config.tokenizer.train_characters
    for corpus in config.texts:
        for document in read_documents(corpus, config):
            if not document.held_out and _sample_order(document) <= threshold and left > 0:
                yield document.text[:left]
                left -= len(document.text)


def _tokenise(
    corpus: TextCorpus,
    scan: Scan,
    config: DataConfig,
    tokenizer: TextTokenizer,
    root: Path,
    report: Callable[[str], None],
) -> TokenDirectory:
    """The token directory of a corpus, written where it does not exist yet."""
    final = root / "tokens" / fingerprint([scan.fingerprint, tokenizer.fingerprint])
    if not is_stored(final):
        report(f"tokenising {corpus.kind}: {sum(scan.train_characters):,} characters")
        with new_directory(final) as directory:
            writer = TokenWriter(directory, tokenizer.vocab_size, tokenizer.end_of_text)
            identity = hashlib.sha256()
            documents = read_documents(corpus, config)
            while batch := list(islice(documents, BATCH_DOCUMENTS)):
                for document, ids in zip(batch, tokenizer.encode([d.text for d in batch]), strict=True):
                    identity.update(document.digest + bytes([document.held_out]))
                    writer.add(ids, document.digest, len(document.text.encode()), document.held_out)
            if identity.hexdigest() != scan.fingerprint:
                raise DataError(
                    f"A {corpus.kind} corpus changed while it was read.", "Run again when it is at rest."
                )
            writer.close(scan.fingerprint, tokenizer.fingerprint)
    return TokenDirectory(final)


def _describe(
    config: DataConfig,
    directories: list[TokenDirectory],
    tokenizer: TextTokenizer,
    tokenizer_path: Path,
    root: Path,
) -> Path:
    """Describe the store's parts to `PreparedData.open`; returns that record's path."""
    weights = [corpus.weight for corpus in config.texts]
    held_out = [directory.manifest.held_out.documents_sha256 for directory in directories]
    record = {
        "corpora": [directory.path.relative_to(root).as_posix() for directory in directories],
        "weights": weights,
        "tokenizer": tokenizer_path.relative_to(root).as_posix(),
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "corpus_fingerprint": fingerprint([[d.manifest.corpus_fingerprint for d in directories], weights]),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "evaluation_fingerprint": fingerprint([held_out, tokenizer.fingerprint]),
    }
    return write_record(root, record)
