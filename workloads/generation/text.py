"""From token ids to text as it streams: characters that span tokens, and stop strings that span tokens.

What a stream gives, put together, is the decoder's text of all its tokens, whatever they are: text that a later token
could change is held back (half a character; a run of bytes, which a stray one turns into U+FFFD).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workloads.data.decoding import REPLACEMENT, decoding_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextStream:
    """The text of one response, token by token; special tokens have none.

    Args:
        stop: the text ends before the first of these that is complete. One that spells a special token is met by the
            token, too.
        continues: the text goes on from another one: a decoder that drops the blank before a text keeps it.

    Attributes:
        stopped: a stop string was met: the text has ended before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), continues: bool = False) -> None:
        self._decoding = decoding_of(tokenizer)
        self._stop = tuple(stop)
        self._fresh = not continues  # no text has been decoded yet
        self._window: list[int] = []  # tokens whose text is not whole yet
        self._given = 0  # characters of the window's text that are certain, and in _pending or sent
        self._pending = ""  # certain, but perhaps the beginning of a stop string; special tokens spelled out
        self._shown: list[bool] = []  # of each pending character, whether it is text
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is now certain."""
        special = self._decoding.specials.get(token)
        if special is not None:
            return self._accept("", self._held() if self._stop else "", special)
        if self._decoding.tokenizer.id_to_token(token) is None:
            return ""  # beyond the tokenizer's vocabulary, where the model's is larger: the decoder leaves it out
        self._window.append(token)
        if not self._decoding.is_local or self._decoding.is_byte(token):
            return self._accept("", self._held()) if self._stop else ""
        text = self._text()
        certain = text[:-1] if self._decoding.half_characters and text.endswith(REPLACEMENT) else text
        new = certain[self._given :]
        self._given = len(certain)
        if certain == text and (text or not self._fresh):
            self._window, self._given, self._fresh = [], 0, False
        return self._accept(new)

    def finish(self) -> str:
        """What was held back, half characters too. Call it once, after the last token."""
        if self.stopped:
            return ""
        text = self._accept(self._text()[self._given :] if self._window else "")
        if not self.stopped:
            text += _visible(self._pending, self._shown)
        self._window, self._pending, self._shown = [], "", []
        return text

    def _text(self) -> str:
        return self._decoding.text(self._window, continues=not self._fresh)

    def _held(self) -> str:
        """The window's text that is not certain, were it to end here: a stop string in it ends it here. Text with
        U+FFFD would rather be half a character.
        """
        held = self._text()[self._given :] if self._window else ""
        return "" if REPLACEMENT in held else held

    def _accept(self, new: str, held: str = "", special: str = "") -> str:
        """Take in `new` text, certain, and a `special` token; what can be sent. `held` text is only searched."""
        if not self._stop:
            return new
        if not special and all(self._shown):
            return self._accept_text(self._pending + new, held)
        text, shown = self._pending + new, self._shown + [True] * len(new)
        all_text = text + held + special
        all_shown = shown + [True] * len(held) + [False] * len(special)
        cut = self._first_stop(all_text, all_shown)
        if cut is not None:
            return self._end(_visible(all_text, all_shown)[:cut])
        text, shown = text + special, shown + [False] * len(special)
        ready = len(text) - self._undecided(text, shown)
        self._pending, self._shown = text[ready:], shown[ready:]
        return _visible(text[:ready], shown[:ready])

    def _accept_text(self, text: str, held: str) -> str:
        """As `_accept`, of pending and new text without a special token: the usual, and fast."""
        whole = text + held
        cuts = [at for stop in self._stop if (at := whole.find(stop)) >= 0]
        if cuts:
            return self._end(whole[: min(cuts)])
        ready = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._pending, self._shown = text[ready:], [True] * (len(text) - ready)
        return text[:ready]

    def _end(self, text: str) -> str:
        self.stopped, self._pending, self._shown = True, "", []
        return text

    def _first_stop(self, text: str, shown: list[bool]) -> int | None:
        """How much of the visible text stands before the first stop string; None where there is none."""
        visible = _visible(text, shown)
        cuts = [at for stop in self._stop if (at := visible.find(stop)) >= 0]
        if len(visible) < len(text):
            cuts += [sum(shown[:at]) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(cuts, default=None)

    def _undecided(self, text: str, shown: list[bool]) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        visible = _visible(text, shown)
        keep = max((_overlap(visible, stop) for stop in self._stop), default=0)
        if len(visible) == len(text):
            return keep
        places = [at for at, is_shown in enumerate(shown) if is_shown]
        back = len(text) - places[-keep] if keep else 0
        return max([back, *(_overlap(text, stop) for stop in self._stop)])


def _visible(text: str, shown: list[bool]) -> str:
    return text if all(shown) else "".join(c for c, is_shown in zip(text, shown, strict=True) if is_shown)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
