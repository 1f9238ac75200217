"""The pages as programs: which blocks of a Markdown page are commands, files and outputs, and whether an output fits.

Above a fence one comment may stand: `<!-- untested: REASON -->` (a bash block that is not run), `<!-- file: NAME -->`
(written before the next command; so is a block whose first line is `# NAME`), `<!-- output: shape -->` (any numbers),
`<!-- output: whole -->` (nothing is left out but at `  ...`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<language>[\w+-]*)(?P<rest>.*)$")
DIRECTIVE = re.compile(r"^ *<!-- *(untested|file|output)\b *:? *(.*?) *-->$")
FILE_NAME = re.compile(r"^# ([\w.-]+(?:/[\w.-]+)*\.\w+)(?::.*)?$")
NAMED_BY_COMMENT = ("yaml", "json", "python", "text")
KEPT = ("yaml", "python")  # languages in which the line with the name is a comment
SHELLS = ("sh", "shell", "console", "zsh", "shell-session")
LEFT_OUT = "  ..."
NUMBER = re.compile(r"\b[0-9a-f]{8,}\b|-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
ANY_NUMBER = r"(?:[0-9a-f]{8,}|-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)"


class PageError(ValueError):
    """A page that cannot be read as commands, files and outputs."""


@dataclass(frozen=True)
class Output:
    """What a page shows of a command's answer. `mode`: "" (its lines occur in order), "shape" or "whole"."""

    line: int
    text: str
    mode: str = ""


@dataclass(frozen=True)
class Block:
    """A bash block. `untested`: why it is not run; "" for one that is. `files`: name -> text, written before it."""

    line: int
    script: str
    untested: str
    files: dict[str, str]
    output: Output | None = None


@dataclass(frozen=True)
class _Fence:
    line: int
    language: str
    text: str
    directive: tuple[str, str] | None
    follows: bool  # nothing but empty lines stands between it and the fence before


def read_page(path: Path) -> list[Block]:
    """The bash blocks of a page, in order. Raises PageError with the page's name and the line."""
    try:
        return blocks(path.read_text(encoding="utf-8"))
    except PageError as error:
        raise PageError(f"{path.name}:{error}") from None


def blocks(text: str) -> list[Block]:
    """The bash blocks of a page's text. Raises PageError with the line."""
    found: list[Block] = []
    files: dict[str, str] = {}
    after_bash = False  # the fence before is a bash block
    for fence in _fences(text):
        kind, value = fence.directive or ("", "")
        _check(fence, after_bash and fence.follows)
        if fence.language == "bash":
            found.append(Block(fence.line, fence.text, value, files))
            files = {}
        elif not fence.language and after_bash and fence.follows:
            last = found[-1]
            shown = Output(fence.line, fence.text, value)
            found[-1] = Block(last.line, last.script, last.untested, last.files, shown)
        elif kind == "file":
            files[value] = fence.text
        elif fence.language in NAMED_BY_COMMENT and (named := FILE_NAME.match(fence.text.partition("\n")[0])):
            files[named[1]] = fence.text if fence.language in KEPT else fence.text.partition("\n")[2]
        after_bash = fence.language == "bash"
    return found


def _check(fence: _Fence, is_output: bool) -> None:
    """Raise PageError for what would leave a command or an output unread."""
    kind, value = fence.directive or ("", "")
    if fence.language in SHELLS:
        raise PageError(f"{fence.line}: a block of commands is ```bash, not ```{fence.language}")
    if kind == "untested" and (fence.language != "bash" or not value):
        raise PageError(f"{fence.line}: untested: REASON stands above a bash block")
    if kind == "output" and (not is_output or value not in ("shape", "whole")):
        raise PageError(f"{fence.line}: output: shape, or whole, stands above the output of a bash block")
    if kind == "file" and (
        fence.language == "bash" or Path(value).is_absolute() or ".." in Path(value).parts
    ):
        raise PageError(
            f"{fence.line}: file: NAME stands above a block that is written to it, in the page's directory"
        )
    if kind == "file" and not value:
        raise PageError(f"{fence.line}: file: has no name")


def _fences(text: str) -> list[_Fence]:
    """All fenced blocks, their indentation taken off. Raises PageError for one that is not closed."""
    found: list[_Fence] = []
    lines = text.splitlines()
    directive: tuple[str, str] | None = None
    at, follows = 0, False
    while at < len(lines):
        line = lines[at]
        opened = FENCE.match(line)
        if opened:
            end = _end(lines, at, opened["ticks"])
            body = [each.removeprefix(opened["indent"]) for each in lines[at + 1 : end]]
            content = "".join(f"{each}\n" for each in body)
            found.append(_Fence(at + 1, opened["language"], content, directive, follows))
            at, directive, follows = end, None, True
        elif directive is not None:
            raise PageError(f"{at}: <!-- {directive[0]} --> stands directly above a block")
        elif said := DIRECTIVE.match(line):
            directive = (said[1], said[2])
        elif line.strip():
            follows = False
        at += 1
    if directive is not None:
        raise PageError(f"{len(lines)}: <!-- {directive[0]} --> stands directly above a block")
    return found


def _end(lines: Sequence[str], start: int, ticks: str) -> int:
    """The line that closes the fence opened at `start`, both counted from 0."""
    for at in range(start + 1, len(lines)):
        closing = lines[at].strip()
        if closing.startswith(ticks) and not closing.strip(ticks[0]):
            return at
    raise PageError(f"{start + 1}: the block is not closed")


def misfit(shown: Output, printed: str) -> str | None:
    """Why what a command printed is not what the page shows; None: it is. Empty lines and ends of lines are nothing."""
    wanted, got = _lines(shown.text), _lines(printed)
    patterns = [None if line == LEFT_OUT else _pattern(line, shown.mode == "shape") for line in wanted]
    if shown.mode == "whole":
        whole = "".join("(?:.*\n)*" if each is None else f"{each}\n" for each in patterns)
        return (
            None
            if re.fullmatch(whole, "".join(f"{line}\n" for line in got))
            else "more or other lines are printed"
        )
    rest = iter(got)
    for line, each in zip(wanted, patterns, strict=True):
        if each is not None and not any(re.fullmatch(each, candidate) for candidate in rest):
            return f"not printed, or not in this order: {line!r}"
    return None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _pattern(line: str, any_number: bool) -> str:
    """A regular expression of the line. Where numbers may differ, the widths of columns may, too."""
    if not any_number:
        return re.escape(line)
    parts = [re.sub(r"(?:\\ )+", lambda _: r"\ +", re.escape(part)) for part in NUMBER.split(line)]
    return ANY_NUMBER.join(parts)
