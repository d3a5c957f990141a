"""Whatever a client sends, the answer is a 4xx with an OpenAI error body, or an honest answer."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.serve.limits import Limits
from tests.unit.serve.in_process import serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VALID: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 1,
    },
    COMPLETIONS: {"model": "tiny", "prompt": "the cat", "max_tokens": 1},
}  # fmt: skip
LIMITS = Limits(max_body=20_000)

NUMBERS = {
    "temperature": (-1, 2.1, 1e9), "top_p": (0, 1.5, -1), "top_k": (-1, 0.5),
    "max_tokens": (-1, 0.5, 1e3, 10_000), "n": (0, -1, 17, 1.5), "seed": (1 << 63, 0.5),
    "presence_penalty": (2.1, -3), "frequency_penalty": (2.1, -3),
    "repetition_penalty": (0, -1, 11), "guided_regex": (1,),
}  # fmt: skip
WRONG_TYPES = {
    "model": (1, [], {}, None, True), "temperature": ("0.5", [], {}, True), "top_p": ("1", [1]),
    "max_tokens": ("3", [], True), "n": ("1", [1], True), "seed": ("1", {}),
    "stop": (1, [1], {}, [""], "", ["x"] * 17), "stream": ("true", 1, []),
    "stream_options": (1, [], {"include_usage": 1}, {"other": True}, {}),
    "logit_bias": ([], 1, {"a": 1}, {"1": "x"}, {"1": 101}, {"999999": 1}, {"-1": 1}, {"01": 1}),
    "response_format": (
        "json", {}, {"type": "xml"}, {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": 1}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strnig"}}},
    ),
    "guided_json": (1, [], {"type": "nothing"}), "guided_regex": ("(", "", "[", []),
    "best_of": (3,), "suffix": ("x",), "unknown": (1, None), "Temperature": (1,),
    "ignore_eos": (1,),
    "top_logprobs": (-1, 21, "1", 2), "functions": ([],), "prompt_logprobs": (1,),
}  # fmt: skip
ONLY = {
    CHAT: {
        "messages": (
            None, [], {}, "hi", [1], ["hi"], [{}], [{"role": "user"}], [{"content": "x"}],
            [{"role": "king", "content": "x"}], [{"role": "user", "content": 1}],
            [{"role": "user", "content": None}], [{"role": "user", "content": []}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            [{"role": "user", "content": [{"type": "text"}]}],
            [{"role": "user", "content": "x", "extra": 1}], [{"role": "assistant"}],
            [{"role": "tool", "content": "x"}], [{"role": 1, "content": "x"}],
            [{"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}],
            [{"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function":
             {"name": "f", "arguments": "not json"}}]}],
            [{"role": "user", "content": "the cat " * 400}],
        ),
        "tools": (1, {}, [1], [{}], [{"type": "function"}], [{"type": "web"}],
                  [{"type": "function", "function": {"name": ""}}],
                  [{"type": "function", "function": {"name": "a b"}}],
                  [{"type": "function", "function": {"name": "f", "parameters": 1}}]),
        "tool_choice": ("maybe", "required", {"type": "function", "function": {"name": "g"}}, 1),
        "logprobs": (1, "true"), "max_completion_tokens": (0, -1, 5), "prompt": ("x",),
        "modalities": (["audio"],), "parallel_tool_calls": ("no",),
    },
    COMPLETIONS: {
        "prompt": (None, 1, [], {}, [[]], [1, "a"], [[1], "a"], [["a"]], [1.5], [-1], [10**9],
                   [True], "", [""], ["a", ""], [[1], []], "the cat " * 400, ["a"] * 17,
                   [303], [[1, 300]]),
        "logprobs": (-1, 21, True, "1"), "echo": (1, "yes"), "max_tokens": (0,),
        "messages": ([],), "tools": ([],),
    },
}  # fmt: skip


def malformed(path: str) -> Iterator[dict[str, Any]]:
    """Every wrong value in an otherwise valid body, and every body without a required field."""
    for table in (NUMBERS, WRONG_TYPES, ONLY[path]):
        for name, values in table.items():
            for value in values:
                yield VALID[path] | {name: value}
    for name in VALID[path]:
        if name != "max_tokens":
            yield {key: value for key, value in VALID[path].items() if key != name}
    yield VALID[path] | {"stream_options": {"include_usage": True}}
    yield VALID[path] | {"guided_regex": "a", "response_format": {"type": "json_object"}}


def fuzzed(path: str, count: int) -> Iterator[bytes]:
    """Bodies that are no JSON objects: cut, with bytes put in, nested, huge, or other documents."""
    random_ = random.Random(7)
    text = json.dumps(VALID[path]).encode()
    for number in range(count):
        kind = number % 7
        if kind == 0:
            yield text[: random_.randrange(len(text))]
        elif kind == 1:
            at = random_.randrange(len(text))
            yield text[:at] + bytes([random_.choice([0, 1, 7, 0xFF, 0xC0])]) + text[at:]
        elif kind == 2:
            yield json.dumps(random_.choice([1, None, "x", [], [VALID[path]], True, 0.5])).encode()
        elif kind == 3:
            yield b'{"a":' * random_.randrange(300, 3000) + b"1"
        elif kind == 4:
            yield text.replace(b"1", random_.choice([b"NaN", b"Infinity", b"1e999", b"01", b"+1"]))
        elif kind == 5:
            yield text.replace(b"the cat", rb"\ud800 the cat")
        else:
            yield b" " * (LIMITS.max_body + random_.randrange(1, 9)) + text


def test_malformed_requests_get_a_4xx(loaded: LoadedModel) -> None:
    async def run() -> int:
        count = 0
        async with serving(loaded, limits=LIMITS) as (_, client):
            for path in VALID:
                for body in malformed(path):
                    answer = await client.post(path, json=body)
                    _check(answer, body)
                    count += 1
                for data in fuzzed(path, 200):
                    headers = {"content-type": "application/json"}
                    _check(await client.post(path, content=data, headers=headers), data)
                    count += 1
            for path in VALID:  # and it still answers
                assert (await client.post(path, json=VALID[path])).status_code == 200
        return count

    assert asyncio.run(run()) >= 500


def _check(answer: Any, sent: object) -> None:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text, sent)
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert error["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = sorted({*NUMBERS, *WRONG_TYPES, *ONLY[CHAT], *ONLY[COMPLETIONS]} - {"model"})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(VALID)),
    st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3),
)
def test_any_value_in_any_field_is_answered_or_refused(
    loaded: LoadedModel, path: str, changes: dict[str, Any]
) -> None:
    async def run() -> None:
        async with serving(loaded, limits=LIMITS) as (service, client):
            headers = {"content-type": "application/json"}
            body = json.dumps(VALID[path] | changes)
            answer = await client.post(path, content=body, headers=headers)
            assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
            assert service.dispatcher.failure is None

    asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["application/json", "text/plain", "", "a/b;c=d"]))
def test_any_bytes_are_refused(loaded: LoadedModel, body: bytes, kind: str) -> None:
    async def run() -> None:
        async with serving(loaded, limits=LIMITS) as (_, client):
            headers = {"content-type": kind}
            answer = await client.post(CHAT, content=body, headers=headers)
            _check(answer, body)

    asyncio.run(run())
