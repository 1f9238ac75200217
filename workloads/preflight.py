"""What can be known of a job before it is queued: that functions import and take (prompts, responses), that files are
there, not empty, and hold what the workload reads, that a critic reads the actor's tokens. Started by `escala submit`
(escala.preflight) in a process of its own, since it imports what users wrote. No torch here.

Reads a request {inputs, config, waits} as JSON from stdin; writes the problems found, each [message, hint], as JSON
to the file that is named.
"""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from escala.contract.checkpoints import MANIFEST, TOKENIZER
from escala.contract.errors import DataError, EscalaError
from escala.schema.data import TextFiles, TextLines, corpora_of
from escala.schema.rewards import KINDS as REWARDS
from workloads.data.chat_loading import load_chat_tokenizer
from workloads.data.dialogues import prompt_of, read_dialogues, read_lines, text_of
from workloads.data.preferences import read_preferences
from workloads.rewards.user_functions import import_function

FIRST_LINES = 100
Config = dict[str, Any]
Check = Callable[[], object]


def problems(inputs: Mapping[str, str], config: Config, waits: bool) -> list[tuple[str, str]]:
    """(message, hint) of each check that failed.

    Args:
        inputs: what the configuration's files hold, by their dotted keys: "dialogues", "preferences", "prompts",
            "model".
        waits: the job starts after another one, which may write its files.
    """
    found = []
    for check in checks(inputs, config, waits):
        try:
            check()
        except EscalaError as error:
            found.append((error.message, error.hint))
    return found


def checks(inputs: Mapping[str, str], config: Config, waits: bool) -> Iterator[Check]:
    """What is to be checked of this configuration, one by one."""
    for section in [*config.get("rewards", []), *config.get("reward", [])]:
        needs = REWARDS.read(section).needs()
        yield from (partial(import_function, name) for name in needs.functions)
        for references in needs.references:
            yield from _file(references, _references, waits)
        for model in needs.models:
            yield from _file(model, _any_model, waits)
    for key, content in inputs.items():
        yield from _file(_value(config, key), READERS[content], waits)
    for corpus in corpora_of(config):
        match corpus.needs():
            case TextFiles() as files:
                yield partial(_matching, files)
            case TextLines(path, text_key):
                yield from _file(path, partial(_texts, key=text_key), waits)
    yield lambda: _same_tokens(config)


def _value(config: Config, key: str) -> Any:
    """What stands at the dotted `key`; None where a section is left out."""
    found: Any = config
    for part in key.split("."):
        found = None if found is None else found[part]
    return found


def _file(path: str | None, read: Callable[[Path], Iterable[Any]], waits: bool) -> Iterator[Check]:
    """That the file is there and its first lines can be read; not where another job may still write it."""
    if path is None or (waits and not Path(path).exists()):
        return
    yield lambda: list(islice(_regular(Path(path), read), FIRST_LINES))


def _regular(path: Path, read: Callable[[Path], Iterable[Any]]) -> Iterable[Any]:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.", "Check the path.") from None
    if read is not _any_model and not stat.S_ISREG(mode):
        raise DataError(f"{path} is no regular file.", "Give a file of JSON lines.")
    return read(path)


def _any_model(path: Path) -> Iterable[Any]:
    """A model is a file or a directory; what is in it, the run itself checks."""
    if path.is_dir() and not any(path.iterdir()):
        raise DataError(f"{path} is empty.", "Give the directory that holds the model.")
    return ()


def _references(path: Path) -> Iterable[Any]:
    return ((prompt_of(where, line), text_of(where, line, "response")) for where, line in read_lines(path))


def _texts(path: Path, key: str) -> Iterable[Any]:
    return (text_of(where, line, key) for where, line in read_lines(path))


def _matching(wanted: TextFiles) -> None:
    """Raise DataError where no file with text matches."""
    root = Path(wanted.root)
    if not root.is_dir():
        raise DataError(f"{root} is no directory.", "Check data.corpora[].root.")
    files = (path for pattern in wanted.globs for path in root.glob(pattern))
    if not any(path.is_file() and path.stat().st_size for path in files):
        raise DataError(
            f"No file with text in {root} matches {', '.join(wanted.globs)}.",
            "Check data.corpora[].globs.",
        )


def _same_tokens(config: Config) -> None:
    """Raise DataError for a critic that reads other tokens than the actor. GGUF files are left to the run: to read them
    takes long.
    """
    actor: str | None = config.get("tokenizer") or (config.get("start") or {}).get("path")
    critic: str | None = ((config.get("critic") or {}).get("start") or {}).get("path")
    if actor is None or critic is None:
        return
    if any(path.endswith(".gguf") or not Path(path).exists() for path in (actor, critic)):
        return
    if (
        load_chat_tokenizer(_tokenizer_path(Path(actor))).fingerprint
        != load_chat_tokenizer(_tokenizer_path(Path(critic))).fingerprint
    ):
        raise DataError(
            f"The critic at {critic} has another tokenizer than the actor.",
            "Train the reward model from the same base, or leave critic.start out.",
        )


def _tokenizer_path(path: Path) -> Path:
    """Where the tokenizer of a model is: beside a checkpoint, among a job's checkpoints, or with the model."""
    if (path / MANIFEST).is_file():
        return path.parent / TOKENIZER
    return path / TOKENIZER if (path / TOKENIZER).is_dir() else path


def _prompts(path: Path) -> Iterable[Any]:
    return (prompt_of(where, record) for where, record in read_lines(path))


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    "dialogues": read_dialogues,
    "preferences": read_preferences,
    "prompts": _prompts,
    "model": _any_model,
}


def main(result: str) -> int:
    """The process."""
    request = json.load(sys.stdin)
    Path(result).write_text(json.dumps(problems(request["inputs"], request["config"], request["waits"])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
