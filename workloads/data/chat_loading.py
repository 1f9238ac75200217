"""Chat tokenizers from files: a Hugging Face directory, a tokenizer.json, a .gguf file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, processors

from escala.contract.errors import DataError, NotFoundError
from workloads.data.chat import PLAIN_TEMPLATE, ChatTokenizer
from workloads.data.ends import generation_ends
from workloads.data.tokenizer import KNOWN_ENDS, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_chat_tokenizer(path: str | Path, model: Path | None = None) -> ChatTokenizer:
    """The tokenizer and template in a Hugging Face directory, a tokenizer.json, or a .gguf file.

    One without a chat template gets PLAIN_TEMPLATE. A GGUF's is rebuilt by transformers, which does not know every
    pre-tokenizer: SmolLM2's splits of digits are lost, so numbers cost fewer tokens than in training.

    Args:
        model: another directory or .gguf file, that of the tokenizer's model, whose ends of generation count too.

    Raises NotFoundError, or DataError where there is no tokenizer, or none with an end-of-text token.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise NotFoundError(
            f"there is no tokenizer at {path}", "give a directory, a tokenizer.json or a .gguf file"
        )
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast  # its constructor has no types
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.suffix == ".gguf":
            theirs = fast.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
        elif path.is_dir():
            theirs = fast.from_pretrained(str(path), local_files_only=True)
        else:
            theirs = fast(tokenizer_file=str(path))
    except ImportError as error:
        raise DataError(f"the tokenizer {path} can't be read: {error}.", "pip install gguf") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"there is no tokenizer that can be read at {path}: {error}.") from error
    rebuilt = theirs.backend_tokenizer.to_str()
    tokenizer = Tokenizer.from_str(rebuilt)
    if path.suffix != ".gguf" and file.is_file():
        own = Tokenizer.from_file(str(file))
        if own.get_vocab() == tokenizer.get_vocab():  # else tokenizer_config.json adds tokens
            tokenizer = own
    ends = [*generation_ends(path), *(generation_ends(model) if model is not None else [])]
    return _assemble(tokenizer, theirs, str(path), ends)


def _assemble(
    tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, name: str, ends: Sequence[int]
) -> ChatTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if theirs.eos_token is None:
        theirs.eos_token = next((token for token in KNOWN_ENDS if token in vocabulary), None)
    if theirs.eos_token not in vocabulary:
        raise DataError(
            f"The tokenizer {name} has no end-of-text token.",
            f"Name it in tokenizer_config.json (eos_token), or add one of {', '.join(KNOWN_ENDS)} to it.",
        )
    if not theirs.chat_template:
        theirs.chat_template = PLAIN_TEMPLATE
    try:
        template = str(theirs.get_chat_template())
    except ValueError as error:  # several, none of them the default
        raise DataError(f"The tokenizer {name} has no chat template to take: {error}") from error
    plain, marked_up = (Tokenizer.from_str(tokenizer.to_str()) for _ in range(2))
    plain.encode_special_tokens = True
    for each in (plain, marked_up):
        each.post_processor = processors.Sequence([])  # ByteLevel's trims offsets
    chat = ChatTokenizer(
        tokenizer,
        template,
        vocabulary[theirs.eos_token],
        (),
        max(vocabulary.values()) + 1,
        tokenizer_fingerprint(tokenizer),
        theirs,
        plain,
        marked_up,
    )
    others = {*ends, *chat.ends_of_turn()} - {chat.end_of_text}
    return replace(chat, end_ids=(chat.end_of_text, *sorted(others)))
