"""Passwords and tokens out of everything that is shown, logged or sent to the tracker: one function, `hide`, at every
edge. Standard library only; what is hidden twice stays as it is.

Two rules. By form: whatever part of a URL holds one (user:password@, ?password=, a token in the path), `password=...`
of a connection string, an option's and `"password": "..."`, tokens of known issuers. By value: what the secret
variables of this process's environment hold, in whatever form a library repeats it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, unquote

HIDDEN = "***"
_ORDINARY = {
    "escala",
    "mlflow",
    "postgres",
    "postgresql",
    "password",
    "secret",
    "token",
}  # hidden by form alone
SHORTEST = 5  # of a value that is looked for wherever it stands: shorter ones are words

_NAME = (
    r"[\w.-]{0,60}(?:password|passwd|passphrase|passwort|pwd|secret|api[_-]?key|access[_-]?key|private[_-]?key|credential)"
    r"s?(?:[_-](?:key|value|token|id))*"
)
_TOKEN = (
    r"(?:[\w.-]{0,60}[_.-])?"
    r"(?:auth|access|bearer|refresh|session|security|private|id|api|sas|hf|hub|job)[_-]?token|token"
)
_IN_QUERY = rf"(?:{_NAME}|{_TOKEN}|sig|signature|[\w.-]+[_-]signature|[\w.-]*auth|key|code|pw|pass|jwt)"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s<>`]+")
_USERINFO = re.compile(r"([^\s:/?#@'\",]*)(:.*)?@")
_PORT = re.compile(r"[^\s:/?#@]*:\d{1,5}([/?#'\",)\]}]|$)")
_PAIR = re.compile(r"([?&;#])([^=?&;#\s'\"]+)=([^&;#\s'\"]*)")
_SECRET_SEGMENT = re.compile(r"(/(?:tokens?|secrets?|keys?|auth|passwords?)/)[^/?#'\"]+", re.IGNORECASE)
_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_RANDOM_SEGMENT = re.compile(
    rf"(?<=/)(?=[^/?#]*\d)(?=[^/?#]*[A-Za-z])(?:[A-Za-z0-9_~]{{20,}}|{_UUID})(?=[/?#'\",)\]}}]|$)"
)
_BARE_USERINFO = re.compile(r"(?<![\w/:@.+-])([\w.+-]+):([^\s:@/'\"]+)@(?=[\w\[])")
_NO_SCHEME = re.compile(r"(?<![\w:])(//[^\s:/@]{1,200}):[^\s@/'\"]{1,500}@")
_STATED = re.compile(
    rf"(?<![\w.-])((?:--?)?(?:{_NAME})['\"]?\s*[=:]\s*)('[^']*'|\"[^\"]*\"|[^\s,;&'\"{{}}\[\]]+)",
    re.IGNORECASE,
)
_OPTION = re.compile(rf"(?<!\S)(--(?:{_NAME}|{_TOKEN})(?:\s+|=))(\S+)", re.IGNORECASE)
_HEADER = re.compile(r"\b((?:authorization|cookie)['\"]?\s*:\s*['\"]?)[^\r\n'\"]+", re.IGNORECASE)
_BEARER = re.compile(r"\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_ISSUED = re.compile(
    r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|xox[abprs]-|sk-|dapi|AKIA|ASIA)[A-Za-z0-9_-]{12,}"
)
_VARIABLE = re.compile(r"(PASSWORD|PASSWD|PASSPHRASE|TOKEN|SECRET|API_KEY|ACCESS_KEY|CREDENTIAL)$")
_ADDRESSES = ("ESCALA_DATABASE_URL", "ESCALA_TRACKING_URI", "MLFLOW_TRACKING_URI", "ESCALA_RAY_DASHBOARD")


def hide(text: str) -> str:
    """`text` with each secret as ***."""
    known = _known(tuple(sorted(_variables().items())))
    text = known.sub(HIDDEN, text) if known else text
    text = _URL.sub(lambda found: _hide_url(found.group()), text)
    text = _BARE_USERINFO.sub(rf"\1:{HIDDEN}@", text)
    text = _NO_SCHEME.sub(rf"\1:{HIDDEN}@", text)
    text = _STATED.sub(_stated, text)
    text = _OPTION.sub(rf"\1{HIDDEN}", text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    return _ISSUED.sub(HIDDEN, text)


def hide_in(value: Any) -> Any:
    """Plain data with every text in it hidden, and what stands under a secret's key."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, Mapping):
        return {key: _hide_under(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_in(item) for item in value]
    return value


def hide_arguments(arguments: Iterable[str]) -> tuple[str, ...]:
    """A command line, word by word; the word after an option of such a name too."""
    hidden, after = list[str](), False
    for word in arguments:
        hidden.append(HIDDEN if after else hide(word))
        after = bool(re.fullmatch(rf"--?({_NAME}|{_TOKEN})", word, re.IGNORECASE))
    return tuple(hidden)


def hide_in_logs() -> None:
    """Let the root logger's handlers, tracebacks included, write nothing secret."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Hiding(handler.formatter or logging.Formatter()))


def print_exception(error: BaseException) -> None:
    """An exception with its causes and its traceback, to stderr."""
    sys.stderr.write(hide("".join(traceback.format_exception(error))))
    sys.stderr.flush()


def hide_in_tracebacks() -> None:
    """Let an exception that nobody catches be shown without secrets, its causes included."""

    def show(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
        print_exception(error)

    sys.excepthook = show


class _Hiding(logging.Formatter):
    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return hide(self._inner.format(record))


def _hide_under(key: str, value: Any) -> Any:
    if value and re.fullmatch(rf"(?:{_NAME}|{_TOKEN})", key, re.IGNORECASE):
        if isinstance(value, str):
            return HIDDEN
        if isinstance(value, list | tuple):
            return [_hide_under(key, item) for item in value]
    return hide_in(value)


def _hide_url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    web = scheme.lower().startswith("http")
    found = None if web and _PORT.match(rest) else _USERINFO.match(rest)
    if found and found.group(2) != ":PASSWORD":  # our own hints
        user, password = found.groups()
        shown = HIDDEN if web else f"{user}:{HIDDEN}" if password else user
        rest = f"{shown}@{rest[found.end() :]}"
    rest = _PAIR.sub(_hide_pair, rest)
    if web:
        path, mark, fragment = rest.partition("#")
        path = _RANDOM_SEGMENT.sub(HIDDEN, _SECRET_SEGMENT.sub(rf"\1{HIDDEN}", path))
        rest = path + mark + fragment
    return f"{scheme}://{rest}"


def _hide_pair(found: re.Match[str]) -> str:
    """A pair of a query or a fragment: its value is hidden for its name's sake, or for what it holds (another URL, a
    connection string), percent-encoded or not.
    """
    mark, name, value = found.groups()
    inside = unquote(value)
    secret = re.fullmatch(_IN_QUERY, unquote(name), re.IGNORECASE)
    if secret or (("=" in inside or "://" in inside) and hide(f"?{inside}") != f"?{inside}"):
        value = HIDDEN
    return f"{mark}{name}={value}"


def _stated(found: re.Match[str]) -> str:
    value = found.group(2)
    quote = value[0] if value[0] in "'\"" else ""
    return f"{found.group(1)}{quote}{HIDDEN}{quote}"


def _variables() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if v and (k in _ADDRESSES or _VARIABLE.search(k))}


@lru_cache(maxsize=8)
def _known(variables: tuple[tuple[str, str], ...]) -> re.Pattern[str] | None:
    """What finds the secrets that these variables hold, as written and percent-decoded; None where there is none."""
    found: set[str] = set()
    for name, value in variables:
        found |= _secrets_of(value) if name in _ADDRESSES else {value}
    found |= {unquote(value) for value in found}
    words = [
        v for v in found if len(v) >= SHORTEST and not v.isdigit() and v[0] != "/" and v not in _ORDINARY
    ]
    longest_first = "|".join(re.escape(value) for value in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)") if words else None


def _secrets_of(url: str) -> set[str]:
    """Passwords in an address, tokens in its path, and the user where that is the secret; no password that is another
    part of it as well.
    """
    scheme, _, rest = url.partition("://")
    place, at, behind = rest.rpartition("@")
    user, colon, password = place.partition(":")
    found = ({password} if colon else {user} if scheme.startswith("http") else set()) if at else set()
    pairs = [pair for part in re.split(r"[?#;]", behind)[1:] for pair in parse_qsl(part)]
    named = {value for key, value in pairs if re.fullmatch(_IN_QUERY, key, re.IGNORECASE)}
    path = f"/{behind.partition('#')[0].partition('/')[2]}" if scheme.startswith("http") else ""
    in_path = {part.group() for part in _RANDOM_SEGMENT.finditer(path)}
    in_path |= {part.group().rpartition("/")[2] for part in _SECRET_SEGMENT.finditer(path)}
    others = set(re.split(r"[/:?#]", behind))
    return ({value for value in found | named if value != user or not colon} - others) | in_path
