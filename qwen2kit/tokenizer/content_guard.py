"""Keep control tokens that a message merely spells out from becoming control tokens.

Before rendering, each control token inside a message is swapped for a placeholder of characters
that occur nowhere in the conversation. The rendered text is then cut at the control tokens which
the template itself wrote, the placeholders are put back, and the pieces between the cuts are
encoded as plain text. Without such tokens in the messages this equals encoding the text at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen2kit.tokenizer.chat_template import Message

if TYPE_CHECKING:
    from qwen2kit.tokenizer.bpe import Tokenizer

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class ContentGuard:
    """One conversation, protected.

    Attributes:
        messages: safe to render.
        tools: likewise.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._special = {tokenizer.token_bytes(i).decode(): i for i in tokenizer.special_ids}
        self._pattern = re.compile(
            "(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")"
        )
        self._placeholders: dict[str, str] = {}
        self.messages, self.tools = messages, tools
        texts = _strings([messages, tools])
        if self._special and any(self._pattern.search(text) for text in texts):
            mark = _unused_character(texts)
            self._placeholders = {
                token: f"{mark}{index}{mark}" for token, index in self._special.items()
            }
            self.messages = self._hide(messages)
            self.tools = self._hide(tools)

    def encode(self, text: str) -> list[int]:
        """Ids of text rendered from the protected conversation, or of a part of it."""
        if not self._placeholders:
            return self._tokenizer.encode(text)
        ids: list[int] = []
        for piece in self._pattern.split(text):
            if piece in self._special:
                ids.append(self._special[piece])
            elif piece:
                for token, placeholder in self._placeholders.items():
                    piece = piece.replace(placeholder, token)
                ids += self._tokenizer.encode(piece, allow_special=False)
        return ids

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._placeholders[match[0]], value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item) for item in value]
        return value


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return []


def _unused_character(texts: Sequence[str]) -> str:
    used = set().union(*texts)
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)
