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

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]]
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Ids of each context, and what has to follow that many ids to make ids of the whole text
        ``context + continuation``. Equal contexts give the same tuple."""
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        ids = dict(zip(contexts, map(tuple, self.encode(contexts)), strict=True))
        # What stands before the last piece of a context does not depend on what is appended.
        last = {context: self._pieces(context)[-1] for context in contexts}
        tails = self.encode([last[context] + continuation for context, continuation in pairs])
        known = {piece: len(self._known[piece]) for piece in last.values()}
        return [
            (ids[context], tuple(tail[known[last[context]] :]))
            for (context, _), tail in zip(pairs, tails, strict=True)
        ]

    def _pieces(self, text: str) -> list[str]:
        return _LINE.split(text) if self._tokenizer.begins_anew_at_lines else [text]

    def _joined(self, pieces: Iterable[str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += self._known[piece]
        return ids
