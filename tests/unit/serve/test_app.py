"""Endpoints in detail, without sockets: keys, bodies, headers, logprobs, grammars that fail."""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Any

import httpx
import pytest

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.errors import ConfigError
from qwen2kit.serve.app import make_app
from qwen2kit.serve.constraints import RequestConstraint
from qwen2kit.serve.fields import IGNORED
from qwen2kit.serve.limits import Limits
from qwen2kit.serve.service import Service
from tests.unit.serve.in_process import ScriptedEngine, serving

BODY = {"model": "tiny", "prompt": "the cat", "max_tokens": 4, "temperature": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
Ask = Callable[[Service, httpx.AsyncClient], Awaitable[Any]]


def run(loaded: LoadedModel, ask: Ask, **options: Any) -> Any:
    async def inside() -> Any:
        async with serving(loaded, **options) as (service, client):
            return await ask(service, client)

    return asyncio.run(inside())


def post(loaded: LoadedModel, path: str, body: object, **options: Any) -> Any:
    async def ask(_: Service, client: httpx.AsyncClient) -> Any:
        answer = await client.post(f"/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return run(loaded, ask, **options)


def test_known_fields_that_change_nothing_are_let_pass(loaded: LoadedModel) -> None:
    plain = post(loaded, "completions", BODY)["choices"]
    assert post(loaded, "completions", BODY | dict.fromkeys(IGNORED, "x"))["choices"] == plain
    nulls = dict.fromkeys(("stop", "seed", "logit_bias", "n", "top_p", "stream", "suffix"))
    assert post(loaded, "completions", BODY | nulls)["choices"] == plain


def test_body_limits(loaded: LoadedModel) -> None:
    async def ask(_: Service, client: httpx.AsyncClient) -> list[int]:
        async def pieces() -> Any:
            for _ in range(300):
                yield b" "

        headers = {"content-type": "application/json"}
        whole = await client.post("/v1/completions", content=b" " * 300, headers=headers)
        chunked = await client.post("/v1/completions", content=pieces(), headers=headers)
        text = await client.post("/v1/completions", content=json.dumps(BODY))
        packed = await client.post(
            "/v1/completions", json=BODY, headers={"content-encoding": "gzip"}
        )
        fits = await client.post("/v1/completions", json=BODY)
        return [answer.status_code for answer in (whole, chunked, text, packed, fits)]

    assert run(loaded, ask, limits=Limits(max_body=256)) == [413, 413, 415, 415, 200]


def test_max_tokens_limit(loaded: LoadedModel) -> None:
    async def ask(_: Service, client: httpx.AsyncClient) -> tuple[int, int]:
        over = await client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 9})
        body = {key: value for key, value in CHAT.items() if key != "max_tokens"}
        body |= {"logit_bias": {"65": 100}}
        bounded = await client.post("/v1/chat/completions", json=body)
        return over.status_code, bounded.json()["usage"]["completion_tokens"]

    assert run(loaded, ask, limits=Limits(max_tokens=8)) == (400, 8)


def test_a_prompt_that_fills_the_context_gets_one_token(loaded: LoadedModel) -> None:
    full = BODY | {"prompt": [5] * 256, "max_tokens": 1}
    assert post(loaded, "completions", full)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("path", ["/", "/health", "/health/live", "/health/ready"])
def test_open_paths_need_no_key(loaded: LoadedModel, path: str) -> None:
    async def ask(_: Service, client: httpx.AsyncClient) -> list[int]:
        keys = (None, "Bearer k", "Bearer K", "k", "bearer k", "Basic k")
        answers = [
            (await client.get(where, headers={} if key is None else {"authorization": key}))
            for where in (path, "/v1/models", "/metrics")
            for key in keys
        ]
        assert all("tiny" not in a.text for a in answers if a.status_code == 401)
        return [answer.status_code for answer in answers]

    open_, guarded = [200] * 6, [401, 200, 401, 401, 200, 401]
    assert run(loaded, ask, key="k") == open_ + guarded + guarded


def test_wrong_methods_name_the_right_ones(loaded: LoadedModel) -> None:
    async def ask(_: Service, client: httpx.AsyncClient) -> None:
        for path in ("/", "/health", "/health/live", "/metrics", "/v1/models", "/v1/models/tiny"):
            assert (await client.head(path)).status_code == 200
        wrong = await client.get("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert set((await client.put("/health")).headers["allow"].split(", ")) == {"GET", "HEAD"}
        unknown = await client.get("/" + "a" * 10_000)
        assert len(unknown.content) < 400

    run(loaded, ask)


@pytest.mark.parametrize("given", ["Bearer k-1", "bearer k-1", "BEARER  k-1 "])
def test_the_key_is_compared_not_the_word_before_it(loaded: LoadedModel, given: str) -> None:
    async def ask(_: Service, client: httpx.AsyncClient) -> list[int]:
        headers = ({"authorization": value} for value in (given, "k-1", "Basic k-1", "Bearer K-1"))
        return [(await client.get("/metrics", headers=found)).status_code for found in headers]

    assert run(loaded, ask, key="k-1") == [200, 401, 401, 401]


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("localhost:8000", False), ("127.0.0.1", False), ("[::1]:8000", False), ("box", False),
        ("host.docker.internal:80", False), ("a.localhost", False), ("10.0.0.7:1", False),
        ("evil.example:8000", True), ("127.0.0.1.evil.example", True), ("localhost.a.b.", True),
    ],
)  # fmt: skip
def test_a_public_name_does_not_reach_a_server_on_localhost(
    loaded: LoadedModel, host: str, public: bool
) -> None:
    async def ask(service: Service, _: httpx.AsyncClient) -> int:
        transport = httpx.ASGITransport(make_app(service, local=True))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            answer = await client.post("/v1/completions", json=BODY, headers={"host": host})
        return answer.status_code

    assert run(loaded, ask) == (403 if public else 200)


@pytest.mark.parametrize(
    ("changes", "param", "reason"),
    [
        ({"min_p": 0.1}, "min_p", "knows no such field"),
        ({"audio": {}}, "audio", "knows no such field"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages.0.user.content.parts.0.type", "'text'"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.user.content.text", "string"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(
    loaded: LoadedModel, changes: dict[str, Any], param: str, reason: str
) -> None:
    async def ask(_: Service, client: httpx.AsyncClient) -> dict[str, str]:
        answer = await client.post("/v1/chat/completions", json=CHAT | changes)
        assert answer.status_code == 400
        return answer.json()["error"]

    error = run(loaded, ask)
    assert error["param"] == param
    assert reason in error["message"]


def test_chat_logprobs_leave_the_end_of_turn_out(loaded: LoadedModel) -> None:
    end = str(loaded.tokenizer.im_end_id)
    body = CHAT | {"logprobs": True, "logit_bias": {end: 100}}
    choice = post(loaded, "chat/completions", body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["content"] == []
    body = BODY | {"logprobs": 1, "logit_bias": {end: 100}}
    assert len(post(loaded, "completions", body)["choices"][0]["logprobs"]["tokens"]) == 1


def test_streamed_completion_logprobs_equal_the_whole(loaded: LoadedModel) -> None:
    body = BODY | {"logprobs": 2, "temperature": 1, "seed": 3, "max_tokens": 12}
    whole = post(loaded, "completions", body)["choices"][0]["logprobs"]

    async def ask(_: Service, client: httpx.AsyncClient) -> str:
        return (await client.post("/v1/completions", json=body | {"stream": True})).text

    lists: dict[str, list[Any]] = {name: [] for name in whole}
    for line in run(loaded, ask).split("\n\n"):
        if line.startswith("data: {"):
            for name, values in (json.loads(line[6:])["choices"][0]["logprobs"] or {}).items():
                lists[name] += values
    assert lists == whole


def test_offsets_count_characters_and_echoed_control_tokens(loaded: LoadedModel) -> None:
    prompt = "<|im_start|>the é cat"
    body = BODY | {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = post(loaded, "completions", body)["choices"][0]
    ids = loaded.tokenizer.encode(prompt)
    texts = [loaded.tokenizer.decode(ids[:count]).removesuffix("�") for count in range(len(ids))]
    assert choice["text"] == prompt
    assert choice["logprobs"]["text_offset"] == [len(text) for text in texts]
    assert "bytes:\\xc3" in choice["logprobs"]["tokens"]


def test_echo_streams_the_prompt_first(loaded: LoadedModel) -> None:
    async def ask(_: Service, client: httpx.AsyncClient) -> str:
        body = BODY | {"echo": True, "stream": True, "max_tokens": 2, "n": 2}
        return (await client.post("/v1/completions", json=body)).text

    chunks = [json.loads(line[6:]) for line in run(loaded, ask).split("\n\n") if "{" in line]
    assert [chunk["choices"][0]["text"] for chunk in chunks[:2]] == ["the cat"] * 2


def test_only_the_length_ends_an_answer_that_ignores_the_end(loaded: LoadedModel) -> None:
    body = BODY | {"logit_bias": {str(loaded.tokenizer.im_end_id): 100}}
    assert post(loaded, "completions", body)["usage"]["completion_tokens"] == 1
    answer = post(loaded, "completions", body | {"ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_may_be_a_control_token(loaded: LoadedModel) -> None:
    token = loaded.tokenizer.im_start_id
    body = BODY | {"logit_bias": {str(token): 100}, "stop": ["<|im_start|>"], "max_tokens": 8}
    answer = post(loaded, "completions", body)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1


def test_tool_calls_stream_while_text_goes_on(loaded: LoadedModel) -> None:
    said = 'Look. <tool_call>\n{"name": "f", "arguments": {"x": "u"}}\n</tool_call>'
    call = {"type": "function", "function": {"name": "f"}}

    async def ask(_: Service, client: httpx.AsyncClient) -> list[Any]:
        body = CHAT | {"tools": [call], "stream": True, "max_tokens": 200}
        text = (await client.post("/v1/chat/completions", json=body)).text
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if "{" in line]
        return [chunk["choices"][0] for chunk in chunks]

    choices = run(_with_tools(loaded), ask, engine=ScriptedEngine(said), capacity=4096)
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Look."
    (made,) = [
        choice["delta"]["tool_calls"] for choice in choices if "tool_calls" in choice["delta"]
    ]
    assert made[0]["function"] == {"name": "f", "arguments": '{"x": "u"}'}
    assert re.fullmatch(r"call-[0-9a-f]{24}", made[0]["id"])
    assert choices[-1]["finish_reason"] == "tool_calls"


def _with_tools(loaded: LoadedModel) -> LoadedModel:
    from dataclasses import replace

    from qwen2kit.tokenizer.bpe import Tokenizer
    from qwen2kit.tokenizer.families import family

    tokenizer = Tokenizer.from_dir(loaded.checkpoint.path)
    tokenizer.chat_template = family("qwen2.5").template
    return replace(loaded, tokenizer=tokenizer)


def test_a_template_without_tools_refuses_them(loaded: LoadedModel) -> None:
    async def ask(_: Service, client: httpx.AsyncClient) -> httpx.Response:
        tool = {"type": "function", "function": {"name": "f"}}
        return await client.post("/v1/chat/completions", json=CHAT | {"tools": [tool]})

    answer = run(loaded, ask)
    assert answer.status_code == 400
    assert "does not support tools" in answer.json()["error"]["message"]


def test_parts_and_roles_reach_the_template(loaded: LoadedModel) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    plain = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    same = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    answers = [
        post(loaded, "chat/completions", CHAT | {"messages": messages, "temperature": 0})
        for messages in (plain, same)
    ]
    assert answers[0]["choices"] == answers[1]["choices"]
    expected = len(loaded.tokenizer.encode_chat(plain))
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [expected] * 2


def test_a_grammar_that_fails_ends_its_own_request_only(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        finished = False

        def mask(self) -> None:
            raise ConfigError("the output grammar cannot be followed: too complex")

        def accept(self, token: int) -> None:
            raise AssertionError("not reached")

    async def ask(service: Service, client: httpx.AsyncClient) -> tuple[int, str, int]:
        with monkeypatch.context() as patch:
            patch.setattr(
                type(service.constraints), "build", lambda *_: RequestConstraint(Failing())
            )
            failed = await client.post("/v1/completions", json=BODY)
        fine = await client.post("/v1/completions", json=BODY)
        return failed.status_code, failed.json()["error"]["message"], fine.status_code

    status, message, after = run(loaded, ask)
    assert (status, after) == (400, 200)
    assert "too complex" in message


def test_the_page_lets_only_its_own_script_run(loaded: LoadedModel) -> None:
    async def ask(_: Service, client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/")

    answer = run(loaded, ask)
    policy = answer.headers["content-security-policy"]
    script = re.search("<script>(.*?)</script>", answer.text, re.DOTALL)
    assert script is not None
    digest = b64encode(sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write"):
        assert forbidden not in answer.text
    assert not re.search(r"(src|href)=\"(https?:)?//", answer.text)


def test_a_bug_is_a_500_without_details(loaded: LoadedModel) -> None:
    async def ask(service: Service, _: httpx.AsyncClient) -> httpx.Response:
        from qwen2kit.serve.app import make_app

        service.metrics.text = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/metrics")

    answer = run(loaded, ask)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "internal error"
