"""Which tokens of a conversation the loss counts: the assistant's, ``<|im_end|>`` included.

Each assistant turn is found by rendering the conversation twice, up to the turn with a generation
prompt, and up to and including it; what the second adds is the turn. This needs no marks in the
template, so any checkpoint's own template works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2kit.errors import DataError
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.chat_template import Message
from qwen2kit.tokenizer.content_guard import ContentGuard


@dataclass(frozen=True, slots=True)
class SupervisedExample:
    """A conversation as training input.

    Attributes:
        tokens: ids of the whole conversation.
        supervised: per token, whether predicting it counts in the loss.
    """

    tokens: list[int]
    supervised: list[bool]


def encode_supervised(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> SupervisedExample:
    """Ids and loss mask of a conversation.

    Text on either side of an assistant turn's first character is encoded separately, as it is at
    inference, where the prompt is encoded before the answer exists. The ids equal
    ``encode_chat(messages, add_generation_prompt=False)`` unless an answer begins with whitespace
    that holds a newline, which would otherwise merge with the newline of the prompt. The newline
    after ``<|im_end|>`` is not supervised.

    Raises:
        DataError: no assistant message, an assistant turn without a supervised token, or a
            template whose rendering of earlier turns changes as the conversation grows.
        TokenizerError: malformed messages or a failing template.
    """
    guard = ContentGuard(tokenizer, messages, tools)

    def render(count: int, prompt: bool = False) -> str:
        return tokenizer.render_chat(
            guard.messages[:count], add_generation_prompt=prompt, tools=guard.tools
        )

    whole = render(len(messages))
    tokens: list[int] = []
    supervised: list[bool] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise DataError("the conversation starts with the assistant; put a user message first")
        start, end = _span(whole, render(index, prompt=True), render(index + 1), index)
        context, turn = guard.encode(whole[position:start]), guard.encode(whole[start:end])
        tokens += context + turn
        supervised += [False] * len(context) + _mask(turn, tokenizer.im_end_id, index)
        position = end
    if not any(supervised):
        raise DataError("the conversation has no assistant message to learn from")
    rest = guard.encode(whole[position:])
    return SupervisedExample(tokens + rest, supervised + [False] * len(rest))


def _span(whole: str, before: str, through: str, index: int) -> tuple[int, int]:
    if not (through.startswith(before) and whole.startswith(through)):
        raise DataError(
            f"the chat template renders the text before message {index} differently once later "
            "messages follow; train on one assistant turn at a time or use another template"
        )
    return len(before), len(through)


def _mask(turn: list[int], im_end_id: int, index: int) -> list[bool]:
    if im_end_id not in turn:
        raise DataError(
            f"message {index}: the chat template does not end the assistant turn with <|im_end|>, "
            "so no token would be supervised"
        )
    end = turn.index(im_end_id)
    return [position <= end for position in range(len(turn))]
