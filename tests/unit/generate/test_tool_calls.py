"""Tool calls found in streamed text, and back through the chat template."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2kit.generate.tool_calls import ToolCall, ToolCallParser, parse_tool_calls
from qwen2kit.tokenizer.chat_template import ChatTemplate
from qwen2kit.tokenizer.families import family

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
WEATHER_CALL = ToolCall("weather", {"city": "Köln"})


def _stream(text: str, cuts: list[int]) -> tuple[str, list[ToolCall]]:
    parser = ToolCallParser()
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parts = [parser.push(text[a:b]) for a, b in pairwise(edges)]
    parts.append(parser.finish())
    return "".join(said for said, _ in parts), [call for _, calls in parts for call in calls]


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (WEATHER, "", [WEATHER_CALL]),
        (f"Let me look.\n{WEATHER}\n{WEATHER}", "Let me look.", [WEATHER_CALL] * 2),
        (f"a\n{WEATHER}\n\n b ", "ab ", [WEATHER_CALL]),
        (WEATHER.removesuffix("\n</tool_call>"), "", [WEATHER_CALL]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [ToolCall("now", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "",
         [ToolCall("f", {"x": 1})]),
        ('<tool_call>{"name": "f", "arguments": {"x": "a\nb"}}</tool_call>', "",
         [ToolCall("f", {"x": "a\nb"})]),
        ('<tool_call>{"name": "f", "arguments": {"x": "</tool_call>\\""}}</tool_call>', "",
         [ToolCall("f", {"x": '</tool_call>"'})]),
    ],
)  # fmt: skip
def test_calls(text: str, said: str, calls: list[ToolCall]) -> None:
    assert parse_tool_calls(text) == (said, calls)


@pytest.mark.parametrize(
    "text",
    [
        "plain \n text \n ",
        "a < b, <tool, <tool_cal",
        "x\n<tool_call>not json</tool_call> y",
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "f", "arguments": "no"}</tool_call>\n',
        '<tool_call>{"name": "unfinished',
        "</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": NaN}"}</tool_call>',
    ],
)
def test_other_text_is_kept_as_it_is(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])


def test_text_streams_at_once() -> None:
    parser = ToolCallParser()
    assert parser.push("Hello") == ("Hello", [])
    assert parser.push(" ") == ("", [])
    assert parser.push("<b>") == (" <b>", [])
    assert parser.push("\n<tool_") == ("", [])
    assert parser.push("box>") == ("\n<tool_box>", [])


@given(st.text(alphabet='ab \n"\\<>/'), st.text(), st.lists(st.integers(0, 400), max_size=8))
def test_where_the_text_is_cut_does_not_matter(around: str, argument: str, cuts: list[int]) -> None:
    body = json.dumps({"name": "f", "arguments": {"x": argument}}, ensure_ascii=False)
    text = f"{around}<tool_call>\n{body}\n</tool_call>{around}"
    expected = parse_tool_calls(text)
    assert expected[1] == [ToolCall("f", {"x": argument})]
    assert expected[0] == around.rstrip() + around.lstrip()
    assert _stream(text, cuts) == expected


def test_what_the_template_renders_is_what_the_parser_reads() -> None:
    calls = [ToolCall("weather", {"city": "Rome", "days": 3}), ToolCall("now", {})]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "Sure.", "tool_calls": [c.message() for c in calls]},
    ]
    text = ChatTemplate(family("qwen2.5").template).render(messages, add_generation_prompt=False)
    answer = text.rpartition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")
    assert parse_tool_calls(answer) == ("Sure.", calls)
