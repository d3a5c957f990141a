"""Tools in a conversation: asked for, allowed or not, told, and gone on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import LoadReport
from qwen2kit.chat.answer import DECLINED, PendingCall
from qwen2kit.chat.session import ChatSession
from qwen2kit.chat.tool_functions import tool_of
from qwen2kit.errors import ConfigError, TokenizerError
from qwen2kit.tokenizer.families import family
from qwen2kit.weights.checkpoint import open_checkpoint
from tests.scripted_model import ScriptedModel
from tests.tiny_checkpoint import write_tiny_checkpoint

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def add(a: int, b: int) -> int:
    """Sum of two numbers."""
    return a + b


class Talk:
    """A session whose model says ``answers`` one after the other."""

    def __init__(self, loaded: LoadedModel, *answers: str) -> None:
        self.prompts: list[str] = []
        self.script: Iterator[str] = iter(answers)
        self.loaded = loaded
        loaded.model.answer = self._answer  # type: ignore[attr-defined]
        self.session = ChatSession(loaded)
        self.session.tools = [tool_of(add)]

    def _answer(self, prompt: tuple[int, ...]) -> list[int]:
        tokenizer = self.loaded.tokenizer
        self.prompts.append(tokenizer.decode(prompt))
        return [*tokenizer.encode(next(self.script)), tokenizer.im_end_id]

    def send(self, text: str, allow: bool = True) -> list[Any]:
        found: list[Any] = []
        for piece in self.session.send(text):
            found.append(piece)
            if isinstance(piece, PendingCall) and allow:
                piece.run()
        return found


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(path, max_position_embeddings=8192)
    return path


@pytest.fixture
def loaded(model_dir: Path) -> LoadedModel:
    checkpoint = open_checkpoint(model_dir)
    tokenizer = checkpoint.tokenizer()
    tokenizer.chat_template = family("qwen2.5").template
    values: dict[str, Any] = {
        "checkpoint": checkpoint,
        "tokenizer": tokenizer,
        "backend": None,
        "model": ScriptedModel(checkpoint.spec, lambda prompt: []),
        "plan": ExecutionPlan(),
        "report": LoadReport(tensors=0, bytes=0, seconds=0.0),
    }
    return LoadedModel(**values)


def test_a_call_is_run_and_told(loaded: LoadedModel) -> None:
    talk = Talk(loaded, f"Let me see.\n{ADD}", "It is 5.")
    found = talk.send("2 + 3?")
    pending = [piece for piece in found if isinstance(piece, PendingCall)]
    assert [(p.call.name, p.call.arguments, p.result) for p in pending] == [
        ("add", {"a": 2, "b": 3}, "5")
    ]
    text = "".join(piece for piece in found if isinstance(piece, str))
    assert text == "Let me see.It is 5."
    assert '"description": "Sum of two numbers."' in talk.prompts[0]
    assert talk.prompts[1].startswith(talk.prompts[0] + f"Let me see.\n{ADD}<|im_end|>")
    assert "<tool_response>\n5\n</tool_response>" in talk.prompts[1]
    last = talk.session.last
    assert last is not None
    assert last.text == text
    assert last.calls == ((pending[0].call, "5"),)
    assert last.finish_reason == "stop"
    assert last.cached_tokens >= len(loaded.tokenizer.encode(talk.prompts[0])) - 1
    roles = [message["role"] for message in talk.session.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert talk.session.messages[1]["tool_calls"] == [pending[0].call.message()]


def test_nothing_runs_without_leave(loaded: LoadedModel) -> None:
    talk = Talk(loaded, ADD, "Then not.")
    talk.send("2 + 3?", allow=False)
    assert f"<tool_response>\n{DECLINED}\n</tool_response>" in talk.prompts[1]
    assert talk.session.last is not None
    assert talk.session.last.calls[0][1] == DECLINED


def test_several_calls_and_unknown_names(loaded: LoadedModel) -> None:
    other = ADD.replace('"add"', '"subtract"').replace("2", "9")
    talk = Talk(loaded, f"{ADD}\n{other}\n{ADD}", "Done.")
    found = talk.send("go")
    assert sum(isinstance(piece, PendingCall) for piece in found) == 2
    contents = [m["content"] for m in talk.session.messages if m["role"] == "tool"]
    assert contents == ["5", "error: no tool subtract; there are add", "5"]


def test_a_model_that_asks_on_is_stopped(loaded: LoadedModel) -> None:
    talk = Talk(loaded, *[ADD] * 50)
    found = talk.send("go")
    assert sum(isinstance(piece, PendingCall) for piece in found) == 16


def test_closing_at_a_call_keeps_a_conversation_that_renders(loaded: LoadedModel) -> None:
    talk = Talk(loaded, f"Well.\n{ADD}\n{ADD}", "Fine.")
    stream = talk.session.send("go")
    assert "".join(iter(lambda: _text(next(stream)), "")) == "Well."
    stream.close()  # type: ignore[attr-defined]
    contents = [m["content"] for m in talk.session.messages]
    assert contents == ["go", "Well.", DECLINED, DECLINED]
    talk.send("and now?")
    assert talk.prompts[1].count("<tool_response>") == 2
    assert talk.session.messages[-1]["content"] == "Fine."


def _text(piece: str | PendingCall) -> str:
    return piece if isinstance(piece, str) else ""


def test_results_that_overflow_the_context_are_an_error_and_leave_no_trace(
    loaded: LoadedModel,
) -> None:
    def shout() -> str:
        """Much."""
        return "word " * 9000

    talk = Talk(loaded, '<tool_call>\n{"name": "shout"}\n</tool_call>')
    talk.session.tools = [tool_of(shout)]
    with pytest.raises(ConfigError, match="context holds 8192"):
        talk.send("go")
    assert talk.session.messages == []


def test_tags_are_text_without_tools(loaded: LoadedModel) -> None:
    talk = Talk(loaded, ADD)
    talk.session.tools = []
    assert "".join(talk.send("go")) == ADD


def test_tools_are_refused_where_they_cannot_be(loaded: LoadedModel) -> None:
    session = Talk(loaded).session
    with pytest.raises(ConfigError, match="same name"):
        session.tools = [tool_of(add), tool_of(add)]
    loaded.tokenizer.chat_template = family("qwen2").template
    loaded.tokenizer.__dict__.pop("_template", None)
    with pytest.raises(TokenizerError, match="does not support tools"):
        session.tools = [tool_of(add)]
    loaded.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        session.tools = [tool_of(add)]
