"""Render a conversation with a checkpoint's own Jinja chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from qwen2kit.errors import TokenizerError

Message = Mapping[str, Any]
"""``role`` and ``content``, and optionally ``tool_calls``, as in Hugging Face chat data."""

_MAX_SOURCE = 1 << 20


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja source, as in tokenizer_config.json.

    Raises:
        TokenizerError: the source does not parse.
    """

    def __init__(self, source: str) -> None:
        import jinja2
        from jinja2 import meta

        from qwen2kit.tokenizer.sandbox import ChatEnvironment

        if len(source) > _MAX_SOURCE:
            raise TokenizerError(f"chat template: longer than {_MAX_SOURCE} characters")
        self.source = source
        environment = ChatEnvironment()
        try:
            self._variables = meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TokenizerError(f"chat template does not compile: {_one_line(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> str:
        """The prompt text.

        Args:
            messages: the conversation, oldest first.
            add_generation_prompt: end with the opening of an assistant turn.
            tools: JSON schemas of the functions on offer.
            special_tokens: ``eos_token`` and the like, visible to the template.

        Raises:
            TokenizerError: malformed messages, tools the template cannot show, or a template that
                fails, refuses the conversation or exceeds the limits of the sandbox.
        """
        from qwen2kit.tokenizer.template_limits import BUDGET, MAX_OUTPUT, Budget

        check_messages(messages)
        if tools and "tools" not in self._variables:
            raise TokenizerError("this checkpoint's chat template does not support tools")
        token = BUDGET.set(Budget())
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=[dict(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **(special_tokens or {}),
            ):
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise TokenizerError(f"chat template: output exceeds {MAX_OUTPUT} characters")
                pieces.append(piece)
        except TokenizerError:
            raise
        except Exception as error:  # template code may raise anything
            raise TokenizerError(f"chat template: {_one_line(error)}") from None
        finally:
            BUDGET.reset(token)
        return "".join(pieces)

    @cached_property
    def default_system(self) -> str | None:
        """The system prompt inserted when a conversation has none; None if there is none."""
        text = self.render([{"role": "user", "content": "x"}], add_generation_prompt=False)
        opening, closing = "<|im_start|>system\n", "<|im_end|>"
        if not text.startswith(opening):
            return None
        return text[len(opening) :].partition(closing)[0]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise TokenizerError unless every message has a role and content the templates can join."""
    if not messages:
        raise TokenizerError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TokenizerError(f"message {index} is not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise TokenizerError(f"message {index} has no role")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            kind = "no" if content is None else f"{type(content).__name__}"
            raise TokenizerError(
                f"message {index} ({role}) has {kind} content; it must be a string"
            )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__
