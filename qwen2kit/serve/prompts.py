"""From what a client sent to token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qwen2kit.errors import TokenizerError
from qwen2kit.serve.chat_request import (
    AssistantMessage,
    ChatRequest,
    Content,
    MadeCall,
    Message,
    SystemMessage,
)
from qwen2kit.serve.completion_request import CompletionRequest
from qwen2kit.serve.errors import invalid
from qwen2kit.tokenizer.bpe import Tokenizer


def chat_prompt(tokenizer: Tokenizer, request: ChatRequest) -> tuple[int, ...]:
    """The conversation through the checkpoint's own template.

    Raises:
        ApiError: the template refuses the conversation, or the model has none.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in request.offered_tools]
    messages = [template_message(message) for message in request.messages]
    try:
        return tuple(tokenizer.encode_chat(messages, tools=tools or None))
    except TokenizerError as error:
        raise invalid(str(error), param="messages") from None


def completion_prompts(tokenizer: Tokenizer, request: CompletionRequest) -> list[tuple[int, ...]]:
    """Each prompt's ids; control tokens written in a text count as such, as in training data.

    Raises:
        ApiError: a prompt is empty or not Unicode.
    """
    prompts = []
    for prompt in request.prompts:
        try:
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        except TokenizerError as error:
            raise invalid(str(error), param="prompt") from None
        if not ids:
            raise invalid("a prompt is empty; send at least one token", param="prompt")
        prompts.append(tuple(ids))
    return prompts


def special_stops(
    tokenizer: Tokenizer, stops: Sequence[str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop strings that are control tokens, as ids, and the other ones.

    Control tokens produce no text, so they could not be found in it.
    """
    ids = {text: tokenizer.token_to_id(text) for text in stops}
    special = {text: i for text, i in ids.items() if i is not None and i in tokenizer.special_ids}
    return tuple(special.values()), tuple(text for text in stops if text not in special)


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates read it: text content, and arguments as objects."""
    if isinstance(message, SystemMessage):
        return {"role": "system", "content": _text(message.content)}
    shaped: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
    if isinstance(message, AssistantMessage) and message.tool_calls:
        shaped["tool_calls"] = [_made_call(call) for call in message.tool_calls]
    return shaped


def _made_call(call: MadeCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
    return {"type": "function", "function": function}


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)
