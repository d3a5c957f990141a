"""The fixed prompts every comparison runs on: several scripts, code, digits, a chat, long text.

All text is our own, so results can be repeated anywhere. A prompt is a list of token ids; which
ids it gives depends on the checkpoint's tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from qwen2kit.tokenizer.bpe import Tokenizer

_ENGLISH = (
    "The harbour was quiet that morning. Two fishing boats lay against the wall, and the old "
    "keeper of the lighthouse walked down to ask what the weather would"
)
_CHINESE = (
    "清晨的港口很安静。两条渔船靠在石墙边，灯塔的老看守人慢慢走下来，想问一问今天的风会不会变大，"
    "孩子们什么时候可以出海。"
)
_CODE = '''def gcd(a: int, b: int) -> int:
    """Greatest common divisor by Euclid's algorithm."""
    while b:
        a, b = b, a % b
    return a


def lcm(a: int, b: int) -> int:
    return'''
_DIGITS = "12 + 35 = 47\n408 - 19 = 389\n7 * 86 = 602\n3.14159 * 2 = 6.28318\n1024 / 64 ="
_QUESTION = "A train leaves at 9:40 and arrives at 12:05. How many minutes does the trip take?"
_PARAGRAPH = (
    "Entry {n}. On day {n} the survey party walked {km} kilometres along the river and set up "
    "camp at a height of {height} metres. The water was cold and clear. Maria drew the map while "
    "Chen counted the birds: {birds} in the reeds, and one heron that would not move. They agreed "
    "that the bridge marked on the older chart, number {bridge}, no longer exists.\n"
)
_LONG_TOKENS = 320


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with a name for tables."""

    name: str
    tokens: tuple[int, ...]


def prompt_set(
    tokenizer: Tokenizer, *, max_tokens: int | None = None, context: int | None = None
) -> list[Prompt]:
    """The comparison prompts, in a fixed order.

    Args:
        tokenizer: the checkpoint's tokenizer.
        max_tokens: add a long prompt of exactly this many tokens.
        context: the most tokens the model can take; longer prompts are cut to it.

    Raises:
        ConfigError: ``max_tokens`` is not positive or exceeds ``context``.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    if max_tokens is not None and context is not None and max_tokens > context:
        raise ConfigError(
            f"a prompt of {max_tokens} tokens does not fit the model's context of {context}"
        )
    prompts = [
        Prompt("english", tuple(tokenizer.encode(_ENGLISH))),
        Prompt("chinese", tuple(tokenizer.encode(_CHINESE))),
        Prompt("code", tuple(tokenizer.encode(_CODE))),
        Prompt("digits", tuple(tokenizer.encode(_DIGITS))),
        Prompt("chat", _chat(tokenizer)),
        Prompt("paragraphs", _long(tokenizer, _LONG_TOKENS)),
    ]
    if max_tokens is not None:
        prompts.append(Prompt(f"long-{max_tokens}", _long(tokenizer, max_tokens)))
    return [Prompt(prompt.name, prompt.tokens[:context]) for prompt in prompts]


def _chat(tokenizer: Tokenizer) -> tuple[int, ...]:
    if tokenizer.chat_template is None:
        return tuple(tokenizer.encode(f"Question: {_QUESTION}\nAnswer:"))
    return tuple(tokenizer.encode_chat([{"role": "user", "content": _QUESTION}]))


def _long(tokenizer: Tokenizer, length: int) -> tuple[int, ...]:
    """``length`` tokens of numbered paragraphs, no two of them alike."""
    tokens: list[int] = []
    n = 1
    while len(tokens) < length:
        text = _PARAGRAPH.format(
            n=n, km=3 + n * 7 % 19, height=210 + n * 37 % 900, birds=n * 11 % 53, bridge=n * 13 % 97
        )
        tokens.extend(tokenizer.encode(text))
        n += 1
    return tuple(tokens[:length])
