"""From token ids to text as it streams: characters that span tokens, and stop strings that span tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one response, token by token; special tokens have none.

    Attributes:
        stopped: a stop string was met: the text has ended before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._decoded = 0  # characters that the stream has given
        self._pending = ""  # given, but perhaps the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is now certain."""
        self._tokens.append(token)
        return self._accept(self._stream.step(self._tokenizer, token) or "")

    def finish(self) -> str:
        """What was held back, half characters too. Call it once, after the last token."""
        if self.stopped:
            return ""
        rest = self._tokenizer.decode(self._tokens, skip_special_tokens=True)[self._decoded :]
        text = self._accept(rest) + self._pending
        self._pending = ""
        return text

    def _accept(self, new: str) -> str:
        self._decoded += len(new)
        text = self._pending + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._pending = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
