"""How tokens and their probabilities are spelled in answers."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen2kit.backend.values import TokenEvent
from qwen2kit.errors import TokenizerError
from qwen2kit.serve.score_memory import TokenScore
from qwen2kit.tokenizer.bpe import Tokenizer

_LOWEST = -9999.0
"""In place of minus infinity, which JSON cannot say."""


def chat_logprobs(tokenizer: Tokenizer, events: Sequence[TokenEvent]) -> list[dict[str, Any]]:
    """``logprobs.content`` of the chat endpoint: one entry per token."""
    return [
        _chat_entry(tokenizer, event.token, event.logprob)
        | {"top_logprobs": [_chat_entry(tokenizer, *pair) for pair in event.top]}
        for event in events
    ]


def _chat_entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    data = _bytes(tokenizer, token)
    text = data.decode("utf-8", errors="replace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log-probability.

    Attributes:
        token: its id.
        logprob: natural-log probability; None for the first token of a prompt.
        top: the likeliest tokens in its place.
        echoed: it is of the prompt, whose text shows control tokens too.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    echoed: bool = False

    @classmethod
    def of(cls, source: TokenEvent | TokenScore) -> ScoredToken:
        """The same of a generated or a prompt token."""
        return cls(source.token, source.logprob, source.top, isinstance(source, TokenScore))


class CompletionLogprobs:
    """``logprobs`` of the completions endpoint: parallel lists.

    Args:
        tokenizer: spells the tokens.
        offset: characters of the choice's text before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._offset = offset
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def render(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """The lists for the next ``tokens``."""
        return {
            "tokens": [self._spell(item.token) for item in tokens],
            "token_logprobs": [_finite(item.logprob) for item in tokens],
            "top_logprobs": [self._top(item) for item in tokens],
            "text_offset": [self._advance(item) for item in tokens],
        }

    def _top(self, item: ScoredToken) -> dict[str, float | None] | None:
        """The likeliest tokens by falling probability, the chosen one among them."""
        if item.logprob is None:
            return None
        pairs = sorted([*item.top, (item.token, item.logprob)], key=lambda pair: -pair[1])
        found: dict[str, float | None] = {}
        for token, logprob in pairs:
            found.setdefault(self._spell(token), _finite(logprob))
        return found

    def _spell(self, token: int) -> str:
        """Its text; what is no text by itself is spelled as OpenAI does, ``bytes:\\xe2\\x82``."""
        data = _bytes(self._tokenizer, token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _advance(self, item: ScoredToken) -> int:
        start = self._offset
        if item.echoed or item.token not in self._tokenizer.special_ids:
            self._offset += len(self._utf8.decode(_bytes(self._tokenizer, item.token)))
        return start


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token stands for; rows of the head that stand for nothing get a name."""
    try:
        return tokenizer.token_bytes(token)
    except TokenizerError:
        return f"<|{token}|>".encode()


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST)
