"""A recall corpus as a token directory of the store, named by its parameters: it is drawn, so they are its content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from escala.schema import RecallCorpus
from escala.tracking.lineage import fingerprint
from workloads.data.cache import TokenDirectory, TokenWriter, is_stored, new_directory
from workloads.data.prepared import PreparedData, write_record
from workloads.data.recall import HELD_OUT, TRAIN, digest, documents

DRAWN = 1  # counted up when the same parameters come to mean other documents


def prepare_recall(corpus: RecallCorpus, root: Path, report: Callable[[str], None]) -> PreparedData:
    """Draw the documents, unless `root` holds them already, and open them. The tokenizer's fingerprint is that of the
    token ids' meaning; there is no tokenizer. Raises DataError for a damaged store.
    """
    identity = fingerprint([DRAWN, corpus.model_dump(mode="json")])
    token_ids = fingerprint(["recall", corpus.keys, corpus.values])
    final = root / "tokens" / fingerprint([identity, token_ids])
    if not is_stored(final):
        report(f"drawing {corpus.documents:,} documents of {corpus.document_tokens} tokens")
        with new_directory(final) as directory:
            writer = TokenWriter(directory, corpus.vocab_size, end_of_text=None)
            for split in (TRAIN, HELD_OUT):
                for document in documents(corpus, split):
                    writer.add(document, digest(document), text_bytes=0, held_out=split == HELD_OUT)
            writer.close(identity, token_ids)
    manifest = TokenDirectory(final).manifest
    record = {
        "corpora": [final.relative_to(root).as_posix()],
        "weights": [1.0],
        "tokenizer": None,
        "vocab_size": corpus.vocab_size,
        "end_of_text": None,
        "corpus_fingerprint": identity,
        "tokenizer_fingerprint": token_ids,
        "evaluation_fingerprint": fingerprint([[manifest.held_out.documents_sha256], token_ids]),
    }
    prepared = PreparedData.open(write_record(root, record))
    report(
        f"data: {prepared.train_tokens:,} training and {prepared.held_out_tokens:,} held-out tokens, "
        f"{corpus.keys} keys and {corpus.values} values"
    )
    return prepared
