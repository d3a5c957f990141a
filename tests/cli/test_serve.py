"""``qwen2kit serve`` as OpenAI's own client sees it, and as an operator does."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.backend.registry import installed
from qwen2kit.tokenizer.families import family
from tests.run_cli import run_cli
from tests.serving import Server
from tests.tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

USER = [{"role": "user", "content": "the cat"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["cat", "dog"]}, "legs": {"enum": [2, 4]}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not installed():
        pytest.skip("no backend installed")
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    write_tiny_checkpoint(path, max_position_embeddings=2048)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = family("qwen2.5").template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for other in path.glob("chat_template*"):
        other.unlink()
    return path


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    with Server(model_dir, "--slots", "4", "--queue", "8", "--max-choices", "6") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=300)


def test_models(client: Any, server: Server) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="gpt-4", messages=USER)
    assert found.value.code == "model_not_found"
    assert json.loads(server.get("/health")[1]) == {"status": "ok"}
    assert server.get("/health/live")[0] == server.get("/health/ready")[0] == 200


def test_chat_equals_the_command_line(client: Any, model_dir: Path) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=12, temperature=0
    )
    shot = run_cli(
        "chat", model_dir, "--prompt", "the cat", "--max-new-tokens", "12", "--greedy"
    ).stdout
    assert answer.choices[0].message.content == shot.removesuffix("\n")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def assert_same_scores(some: list[Any], others: list[Any]) -> None:
    """The same tokens; a prompt that was cached meanwhile may round differently."""
    for one, other in zip(some, others, strict=True):
        pairs = [(one, other), *zip(one.top_logprobs, other.top_logprobs, strict=True)]
        assert all(a.bytes == b.bytes for a, b in pairs)
        assert all(a.logprob == pytest.approx(b.logprob, abs=1e-5) for a, b in pairs)


@pytest.mark.parametrize("n", [1, 3])
def test_stream_says_what_the_whole_answer_says(client: Any, n: int) -> None:
    options = {
        "model": "tiny", "messages": USER, "max_completion_tokens": 16, "temperature": 1.0,
        "top_p": 0.9, "seed": 5, "n": n, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**options)
    texts, tokens, reasons = [""] * n, [[] for _ in range(n)], [None] * n
    usage = None
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    for streamed, choice in zip(tokens, whole.choices, strict=True):
        assert_same_scores(streamed, choice.logprobs.content)
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert len(set(texts)) == n  # choices share the seed, not the draws


def test_seed_repeats_and_no_seed_does_not(client: Any) -> None:
    def text(**options: Any) -> str:
        return client.completions.create(
            model="tiny", prompt="the", max_tokens=24, temperature=1.5, **options
        ).choices[0].text  # fmt: skip

    assert text(seed=-3) == text(seed=-3) != text(seed=4)
    assert text() != text()


def test_completions_take_texts_and_token_ids(client: Any, model_dir: Path) -> None:
    from qwen2kit.tokenizer.bpe import Tokenizer

    tokenizer = Tokenizer.from_dir(model_dir)
    texts = ["the cat sat", "one two"]
    ids = [tokenizer.encode(text) for text in texts]

    def answers(prompt: Any) -> list[str]:
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
        return [choice.text for choice in found.choices]

    assert answers(texts) == answers(ids) == [answers(text)[0] for text in texts]
    assert answers(ids[0]) == answers(texts[0])
    doubled = client.completions.create(
        model="tiny", prompt=texts, n=2, max_tokens=6, temperature=0
    )
    assert [choice.text for choice in doubled.choices] == [t for t in answers(texts) for _ in "12"]
    assert doubled.usage.prompt_tokens == sum(map(len, ids))


def test_logprobs_of_prompt_and_answer_are_those_of_the_model(client: Any, model_dir: Path) -> None:
    import numpy as np

    from qwen2kit import load_model

    loaded = load_model(model_dir)
    answer = client.completions.create(
        model="tiny", prompt="the cat sat", max_tokens=3, temperature=0, logprobs=2, echo=True
    ).choices[0]
    prompt = loaded.tokenizer.encode("the cat sat")
    found = answer.logprobs
    assert answer.text.startswith("the cat sat")
    assert "".join(found.tokens[: len(prompt)]) == "the cat sat"
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert found.text_offset[: len(prompt)] == [
        len(loaded.tokenizer.decode(prompt[:i])) for i in range(len(prompt))
    ]
    logits = loaded.model.logits(prompt).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for position, token in enumerate(prompt[1:]):
        assert found.token_logprobs[position + 1] == pytest.approx(
            logprobs[position, token], abs=1e-4
        )
        best = sorted(logprobs[position])[-2:]
        assert sorted(found.top_logprobs[position + 1].values())[-2:] == pytest.approx(
            best, abs=1e-4
        )
    assert len(found.tokens) == len(prompt) + 3
    scored = client.completions.create(
        model="tiny", prompt="the cat sat", max_tokens=0, logprobs=0, echo=True
    ).choices[0]
    assert scored.text == "the cat sat"
    assert scored.logprobs.token_logprobs == found.token_logprobs[: len(prompt)]


def test_stop_strings_and_bias(client: Any) -> None:
    text = client.completions.create(
        model="tiny", prompt="the", max_tokens=20, temperature=0
    ).choices[0].text  # fmt: skip
    cut = text[3:5]
    stopped = client.completions.create(
        model="tiny", prompt="the", max_tokens=20, temperature=0, stop=["never", cut]
    ).choices[0]
    assert stopped.text == text[: text.index(cut)]
    assert stopped.finish_reason == "stop"
    biased = client.completions.create(
        model="tiny", prompt="the", max_tokens=5, temperature=0, logit_bias={"65": 100}
    ).choices[0]
    assert len(set(biased.text)) == 1
    varied = client.completions.create(
        model="tiny", prompt="the", max_tokens=5, temperature=0, logit_bias={"65": 3},
        extra_body={"repetition_penalty": 1.8}, frequency_penalty=2, presence_penalty=2,
    ).choices[0]  # fmt: skip
    assert len(set(varied.text)) > 1


def test_json_schema(client: Any) -> None:
    pytest.importorskip("llguidance")
    answer = client.chat.completions.create(
        model="tiny", messages=USER, temperature=1, seed=1, max_tokens=200, n=3,
        response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}},
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content)
        assert found["name"] in ("cat", "dog")
        assert found["legs"] in (2, 4)
    digits = client.completions.create(
        model="tiny", prompt="a", max_tokens=20, extra_body={"guided_regex": "[0-9]{3}-[a-f]{2}"}
    ).choices[0].text  # fmt: skip
    assert len(digits) == 6
    with pytest.raises(openai.BadRequestError, match="regular expression"):
        client.completions.create(model="tiny", prompt="a", extra_body={"guided_regex": "("})


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tools(client: Any, choice: Any) -> None:
    pytest.importorskip("llguidance")
    options = {
        "model": "tiny", "messages": USER, "tools": [WEATHER], "tool_choice": choice,
        "temperature": 1, "seed": 2, "max_tokens": 400, "parallel_tool_calls": False,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    deltas = []
    for chunk in client.chat.completions.create(**options, stream=True):
        assert not chunk.choices[0].delta.content
        deltas += chunk.choices[0].delta.tool_calls or []
    assert [(d.index, d.function) for d in deltas] == [(0, d.function) for d in deltas]
    assert "".join(d.function.arguments for d in deltas) == call.function.arguments
    told = [
        *USER, whole.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]  # fmt: skip
    again = client.chat.completions.create(
        model="tiny", messages=told, tools=[WEATHER], max_tokens=4
    )
    assert again.usage.prompt_tokens > 100


def test_errors_have_openai_bodies(client: Any, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="tiny", messages=USER, temperature=3)
    assert found.value.param == "temperature"
    assert found.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(model="tiny", prompt="the cat " * 3000)
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="choices"):
        client.completions.create(model="tiny", prompt="a", n=7)
    for path, status in (("/v1/nothing", 404), ("/v1/completions", 405)):
        code, text = server.get(path)
        assert code == status
        assert json.loads(text)["error"]["type"] == "invalid_request_error"


def test_a_full_queue_answers_429(client: Any, server: Server) -> None:
    """4 slots and 8 waiting: of 8 requests with 6 choices each, two fit at a time."""
    refused: list[Any] = []
    answered: list[Any] = []

    def ask() -> None:
        try:
            answered.append(
                client.completions.create(
                    model="tiny", prompt="a", n=6, max_tokens=300, temperature=1
                )
            )
        except openai.RateLimitError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answered) >= 2
    assert len(refused) >= 1
    assert len(answered) + len(refused) == 8
    for error in refused:
        assert 1 <= int(error.response.headers["retry-after"]) <= 60
        assert error.code == "queue_full"


def test_killed_clients_free_their_slots(server: Server) -> None:
    """Clients that vanish while streaming, while waiting in the queue, and without streaming."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1000, "temperature": 1}

    def connect(**options: object) -> socket.socket:
        data = json.dumps({**body, **options}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
            "Content-Type: application/json\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(head.encode() + data)
        return connection

    streaming = [connect(stream=True) for _ in range(4)]
    for connection in streaming:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
    queued = [connect(stream=index % 2 == 0) for index in range(4)]
    server.wait_for(lambda: server.metric("qwen2kit_waiting") >= 1)
    assert server.metric("qwen2kit_running") >= 1
    for connection in streaming + queued:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    before = server.metric("qwen2kit_generated_tokens_total")
    server.wait_for(lambda: server.metric("qwen2kit_running") == 0)
    assert server.metric("qwen2kit_waiting") == 0
    time.sleep(0.3)
    assert server.metric("qwen2kit_generated_tokens_total") - before < 2000


def test_metrics(server: Server, client: Any) -> None:
    before = server.metric("qwen2kit_generated_tokens_total")
    first = server.metric("qwen2kit_time_to_first_token_seconds_count")
    client.completions.create(model="tiny", prompt="the cat", max_tokens=5, temperature=0)
    assert server.metric("qwen2kit_generated_tokens_total") == before + 5
    assert server.metric("qwen2kit_time_to_first_token_seconds_count") == first + 1
    assert server.metric("qwen2kit_inter_token_seconds_count") >= 4
    assert (
        'qwen2kit_requests_total{endpoint="/v1/completions",status="200"}'
        in (server.get("/metrics")[1])
    )


def test_key(model_dir: Path) -> None:
    with Server(model_dir, key="s3cret-key") as guarded:
        paths = ("/v1/models", "/v1/nothing", "/metrics", "/v1/models/tiny")
        for wrong in ("s3cret-ke", "s3cret-key2", "S3CRET-KEY", "\xff"):
            for path in paths:
                status, text = guarded.get(path, key=wrong)
                assert status == 401
                assert "s3cret" not in text
                assert "tiny" not in text
            body = {"model": "tiny", "prompt": "a"}
            assert guarded.post("/v1/completions", body, key=wrong)[0] == 401
        assert guarded.get("/health", key="no")[0] == 200
        assert guarded.get("/", key="no")[0] == 200
        assert [guarded.get(path)[0] for path in paths] == [200, 404, 200, 200]
        assert guarded.leave() == 0
        assert "s3cret" not in guarded.log


def _stream(server: Server, tokens: int, into: list[str]) -> threading.Thread:
    """A client that reads an answer of ``tokens`` tokens; errors end up in ``into`` too."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

    def read() -> None:
        try:
            for chunk in client.completions.create(
                model="tiny",
                prompt="a",
                max_tokens=tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                into.append(chunk.choices[0].finish_reason or "")
        except openai.APIError as error:
            into.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    server.wait_for(lambda: len(into) > 3)
    return thread


def test_sigterm_finishes_what_runs(model_dir: Path) -> None:
    with Server(model_dir) as leaving:
        seen: list[str] = []
        thread = _stream(leaving, 400, seen)
        assert leaving.leave() == 0
        thread.join(300)
        assert seen[-1] in ("stop", "length")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", leaving.port))


SLOW = """
import time
from qwen2kit.engine.text import TextEngine
whole = TextEngine.step
def step(self):
    time.sleep(0.2)
    return whole(self)
TextEngine.step = step
"""


def test_sigterm_times_out_what_runs_on(model_dir: Path) -> None:
    with Server(model_dir, "--grace", "0.05", prelude=SLOW) as leaving:
        seen: list[str] = []
        thread = _stream(leaving, 900, seen)
        start = time.monotonic()
        assert leaving.leave(signal.SIGINT) == 0
        assert time.monotonic() - start < 100  # it would take 180
        thread.join(300)
        assert "shutting down" in seen[-1]


BREAKS = """
from qwen2kit.engine.text import TextEngine
whole = TextEngine.step
def step(self):
    if self.running == 2 and self.stats.generated_tokens > 50:
        raise RuntimeError("the device is lost")
    return whole(self)
TextEngine.step = step
"""


def test_a_broken_engine_tells_its_clients_and_exits(model_dir: Path) -> None:
    with Server(model_dir, prelude=BREAKS) as broken:
        seen: list[str] = []
        thread = _stream(broken, 900, seen)
        waiting: list[tuple[int, Any]] = []
        body = {"model": "tiny", "prompt": "a", "max_tokens": 900, "ignore_eos": True}
        other = threading.Thread(
            target=lambda: waiting.append(broken.post("/v1/completions", body))
        )
        other.start()
        assert broken.process.wait(300) == 8
        thread.join(300)
        other.join(300)
        assert "the engine failed" in seen[-1]
        assert waiting[0][0] == 500
        assert waiting[0][1]["error"]["code"] == "engine_failed"
        broken.wait_for(lambda: "error: the engine failed" in broken.log)
        assert "RuntimeError: the device is lost" in broken.log


HANGS = """
import time
from qwen2kit.engine.text import TextEngine
from qwen2kit.serve import dispatcher, limits
TextEngine.step = lambda self: time.sleep(1000)
dispatcher._LAST_STEP = 0.5
limits.Limits.__init__.__kwdefaults__["stall"] = 0.2
"""


def test_a_step_that_never_ends_is_noticed_and_does_not_hold_the_server(model_dir: Path) -> None:
    with Server(model_dir, "--grace", "0.1", prelude=HANGS) as stuck:
        body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
        with socket.create_connection(("127.0.0.1", stuck.port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            stuck.wait_for(lambda: stuck.get("/health")[0] == 503)
            assert json.loads(stuck.get("/health/live")[1]) == {"status": "stalled"}
            assert stuck.leave() == 8
            assert connection.recv(100).startswith(b"HTTP/1.1 503")
        stuck.wait_for(lambda: "does not end" in stuck.log)


@pytest.mark.slow
def test_backends_serve_the_same(model_dir: Path) -> None:
    if len(installed()) < 2:
        pytest.skip("one backend only")
    body = {
        "model": "tiny", "prompt": "the cat", "max_tokens": 24, "n": 3, "temperature": 1,
        "seed": 1, "logprobs": 2, "echo": True,
    }  # fmt: skip
    texts, logprobs = [], []
    for name in installed():
        with Server(model_dir, "--backend", name, "--dtype", "float32") as running:
            choices = running.post("/v1/completions", body)[1]["choices"]
            texts.append([choice["text"] for choice in choices])
            logprobs.append(choices[0]["logprobs"]["token_logprobs"][1:])
            assert running.leave() == 0
    assert texts[0] == texts[1]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def test_refusals_are_one_line(model_dir: Path, server: Server) -> None:
    taken = run_cli("serve", model_dir, "--port", str(server.port))
    assert taken.returncode == 2
    assert "give another --host or --port" in taken.stderr
    hidden = run_cli("serve", model_dir, hide="fastapi")
    assert hidden.returncode == 8
    assert "qwen2kit[serve]" in hidden.stderr
    empty = run_cli("serve", model_dir, env={"QWEN2KIT_API_KEY": ""})
    assert empty.returncode == 2
    for done in (taken, hidden, empty):
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.real_model
@pytest.mark.slow
def test_real_model_calls_a_tool_and_reads_its_answer(real_gguf: Path) -> None:
    pytest.importorskip("llguidance")
    city = {"type": "string", "maxLength": 40}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"],
                  "additionalProperties": False}  # fmt: skip
    function = {"name": "get_weather", "description": "Weather of a city now."}
    tools = [{"type": "function", "function": {**function, "parameters": parameters}}]
    asked = [{"role": "user", "content": "What is the weather in Paris right now?"}]
    options = {"model": "real", "temperature": 0, "max_tokens": 48}
    with Server(real_gguf, "--name", "real", "--slots", "2", "--context", "2048") as real:
        client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="any", timeout=300)
        said = client.chat.completions.create(
            messages=asked, tools=tools, tool_choice="required", parallel_tool_calls=False,
            **options,
        ).choices[0].message  # fmt: skip
        (call,) = said.tool_calls
        assert call.function.name == "get_weather"
        assert "Paris" in json.loads(call.function.arguments)["city"]
        result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and cloudy"}
        told = client.chat.completions.create(
            messages=[*asked, said.model_dump(exclude_none=True), result], tools=tools,
            tool_choice="none", **options,
        )  # fmt: skip
        assert "18" in told.choices[0].message.content
        pet = client.chat.completions.create(
            messages=[{"role": "user", "content": "A cat as JSON with name and legs."}],
            response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}},
            **options,
        ).choices[0].message.content  # fmt: skip
        assert json.loads(pet) == {"name": "cat", "legs": 4}
        assert real.metric("qwen2kit_cached_tokens_total") > 0
