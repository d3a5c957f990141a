"""Built-in ChatML templates and stop tokens of the Qwen2 family, for checkpoints without their own.

Qwen1.5 and Qwen2 share a template without tools; Qwen2.5 adds tool calls (Hermes style) and, in
its variants, differs only in the default system prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen2kit.errors import TokenizerError
from qwen2kit.tokenizer.document import ENDOFTEXT, IM_END, IM_START

STOP_TOKENS = (IM_END, ENDOFTEXT)
"""An instruct model ends its turn with the first; the second ends a document."""

_HELPFUL = "You are a helpful assistant."
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_MATH = r"Please reason step by step, and put your final answer within \boxed{}."

_QWEN2 = r"""
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\n' + DEFAULT_SYSTEM + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()

_QWEN25 = r"""
{%- set has_system = messages[0]['role'] == 'system' %}
{{- '<|im_start|>system\n' }}
{{- messages[0]['content'] if has_system else DEFAULT_SYSTEM }}
{%- if tools %}
    {{- '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.' }}
    {{- '\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and ' }}
    {{- 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in (messages[1:] if has_system else messages) %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {%- set function = call.function if call.function is defined else call %}
            {{- '\n<tool_call>\n{"name": "' }}{{- function.name }}{{- '", "arguments": ' }}
            {{- function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role in ('system', 'user', 'assistant') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()


@dataclass(frozen=True, slots=True)
class ChatFamily:
    """A named template and the system prompt it inserts when a conversation has none."""

    name: str
    template: str
    default_system: str


def _family(name: str, source: str, default_system: str) -> ChatFamily:
    literal = "'" + default_system.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return ChatFamily(name, source.replace("DEFAULT_SYSTEM", literal), default_system)


FAMILIES: dict[str, ChatFamily] = {
    family.name: family
    for family in (
        _family("qwen1.5", _QWEN2, _HELPFUL),
        _family("qwen2", _QWEN2, _HELPFUL),
        _family("qwen2.5", _QWEN25, _QWEN),
        _family("qwen2.5-1m", _QWEN25, _HELPFUL),
        _family("qwen2.5-math", _QWEN25, _MATH),
    )
}


def family(name: str) -> ChatFamily:
    """The family called ``name``. Raises TokenizerError that lists the known ones."""
    try:
        return FAMILIES[name]
    except KeyError:
        raise TokenizerError(
            f"no chat template family {name!r}; known: {', '.join(sorted(FAMILIES))}"
        ) from None


def detect(added: dict[str, Any]) -> ChatFamily | None:
    """The family a tokenizer without a template belongs to, from its added tokens.

    Qwen2.5 added ``<tool_call>``; Qwen1.5 and Qwen2 have only the three control tokens. None if
    the ChatML tokens are absent.
    """
    if not {IM_START, IM_END} <= added.keys():
        return None
    return FAMILIES["qwen2.5" if "<tool_call>" in added else "qwen2"]
