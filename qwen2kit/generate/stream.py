"""Token ids in, final text out: incremental decoding that never shows what may yet change."""

from __future__ import annotations

import codecs
from typing import Protocol

from qwen2kit.errors import ConfigError


class TokenSpeller(Protocol):
    """The part of a tokenizer that streaming needs."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that produce no text."""
        ...

    def token_bytes(self, token_id: int, /) -> bytes:
        """The bytes a token stands for."""
        ...


class TextStream:
    """Decodes one generated sequence as it grows.

    Text is held back while it ends in an incomplete UTF-8 character, or in what may become a stop
    string; each token costs time in proportion to its own bytes and the longest stop string.
    Joined, the pieces equal ``tokenizer.decode(ids, skip_special=True)`` up to the stop string.

    Args:
        tokenizer: spells the tokens.
        stop: strings that end the text; the first one completed counts, and is not emitted.

    Attributes:
        stopped: a stop string was reached; later tokens are ignored.

    Raises:
        ConfigError: a stop string is empty.
    """

    def __init__(self, tokenizer: TokenSpeller, stop: tuple[str, ...] = ()) -> None:
        if not all(stop):
            raise ConfigError("a stop string must not be empty")
        self.stopped = False
        self._special, self._spell = tokenizer.special_ids, tokenizer.token_bytes
        self._stop = stop
        self._begins = frozenset(text[0] for text in stop)
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._held = ""

    def push(self, token_id: int) -> str:
        """Text that became final with this token, possibly none."""
        if self.stopped or token_id in self._special:
            return ""
        text = self._decode(self._spell(token_id))
        return self._release(text) if self._stop else text

    def finish(self) -> str:
        """What was held back, now that no token follows; unfinished bytes become U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        if self._begins.isdisjoint(text):
            self._held = ""
            return text
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
