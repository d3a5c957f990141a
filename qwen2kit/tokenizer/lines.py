"""Token ids of many texts that have most of their lines in common, as few-shot prompts do.

Qwen2's splitting never joins a line break to a letter after it, so a text may be cut before every
line that begins with an ASCII letter; each distinct piece is encoded once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2kit.tokenizer.bpe import Tokenizer

_LINE = re.compile(r"(?<=\n)(?=[A-Za-z])")


class LineEncoder:
    """Encodes texts and remembers their pieces.

    Args:
        tokenizer: of any splitting; where pieces would not add up, texts are encoded whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """What `Tokenizer.encode_many` gives. Raises TokenizerError for lone surrogates."""
        pieces = [self._pieces(text) for text in texts]
        unknown = list(dict.fromkeys(p for p in chain(*pieces) if p not in self._known))
        found = self._tokenizer.encode_many(unknown)
        self._known.update(zip(unknown, found, strict=True))
        return [self._joined(parts) for parts in pieces]

    def _pieces(self, text: str) -> list[str]:
        return _LINE.split(text) if self._tokenizer.begins_anew_at_lines else [text]

    def _joined(self, pieces: Iterable[str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += self._known[piece]
        return ids
