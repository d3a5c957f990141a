"""Chat prompts for tasks: the checkpoint's template, with or without a started answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen2kit.errors import TokenizerError
from qwen2kit.tokenizer.bpe import Tokenizer

_MARK = "QWEN2KIT_CONTINUE_HERE"


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
) -> str:
    """The prompt text of ``messages``.

    Without ``add_generation_prompt`` the last message is one the model must go on with: the text
    ends right after its content (transformers' ``continue_final_message``).

    Raises:
        TokenizerError: the template fails, or drops the last message's content.
    """
    if add_generation_prompt or not messages:
        return tokenizer.render_chat(list(messages), add_generation_prompt=add_generation_prompt)
    last = {**messages[-1], "content": messages[-1]["content"] + _MARK}
    text = tokenizer.render_chat([*messages[:-1], last], add_generation_prompt=False)
    if _MARK not in text:
        raise TokenizerError("the chat template drops the last message; its answer prefix is lost")
    return text[: text.rindex(_MARK)]
