"""What a chat shows: Markdown in blocks, leave for tools, the line of figures."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown

from qwen2kit.chat.answer import DECLINED, Answer, PendingCall
from qwen2kit.chat.tool_functions import tool_of
from qwen2kit.cli import chat, chat_turn
from qwen2kit.cli.chat_render import MarkdownScreen, PlainScreen, block_end, interruptible
from qwen2kit.cli.chat_turn import Manner, decide, meter, stream_answer, summary
from qwen2kit.cli.output import emit_json
from qwen2kit.generate.tool_calls import ToolCall

TEXT = """\
# Title

Some *text* that goes
on.

1. one
2. two

   more of two

```python
def f():

    return 1
```

| a | b |
|---|---|
| 1 | 2 |

~~~
```

~~~

The end.
"""


def _blocks(text: str) -> list[str]:
    found = []
    while cut := block_end(text):
        found.append(text[:cut])
        text = text[cut:]
    return [*found, text]


def test_blocks_end_where_markdown_says() -> None:
    blocks = _blocks(TEXT)
    assert "".join(blocks) == TEXT
    assert [block.split("\n")[0] for block in blocks] == [
        "# Title", "Some *text* that goes", "1. one", "```python", "| a | b |", "~~~", "The end.",
    ]  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, len(TEXT) - 1), max_size=30))
def test_where_the_text_is_cut_does_not_matter(cuts: list[int]) -> None:
    """Rendered in pieces it is what rich makes of each block, one empty line between."""
    file = io.StringIO()
    screen = MarkdownScreen(Console(file=file, width=60, force_terminal=False))
    screen._show = lambda: None  # type: ignore[method-assign]
    edges = [0, *sorted(cuts), len(TEXT)]
    for start, end in pairwise(edges):
        screen.write(TEXT[start:end])
    screen.pause()
    console = Console(file=io.StringIO(), width=60, force_terminal=False)
    expected = []
    for block in _blocks(TEXT):
        with console.capture() as rendered:
            console.print(Markdown(block))
        lines = [line.rstrip() for line in rendered.get().strip("\n").splitlines()]
        while not lines[-1]:
            lines.pop()
        while not lines[0]:
            lines.pop(0)
        expected += [*lines, ""]
    assert [line.rstrip() for line in file.getvalue().splitlines()] == expected[:-1]


def test_what_is_shown_while_it_grows_is_wiped() -> None:
    """On a terminal of six lines, a block of twenty: its end is seen, then all of it is left."""
    file = io.StringIO()
    console = Console(file=file, width=40, height=6, force_terminal=True, color_system=None)
    screen = MarkdownScreen(console)
    for number in range(20):
        screen.write(f"- item {number}\n")
    seen = file.getvalue()
    assert "item 19" in seen
    screen.pause()
    final = file.getvalue()[len(seen) :]
    assert final.count("\x1b[2K") >= 4  # the lines that were shown are erased
    assert all(f"item {number}\n" in final.replace(" " * 20, "") or f"item {number}" in final
               for number in range(20))  # fmt: skip


def _answer(**changes: Any) -> Answer:
    answer = Answer(
        text="hi", calls=(), prompt_tokens=90, cached_tokens=0, tokens=11, drafted=0, accepted=0,
        finish_reason="stop", context_tokens=101, context_limit=1000, seconds=3.0,
        first_token_seconds=1.0,
    )  # fmt: skip
    return replace(answer, **changes)


def test_summary() -> None:
    assert summary(_answer(), 50) == (
        "[11 tokens, 5.0 tokens/s, first token after 1.00 s, context ▕██░░░░░░░░░░▏ 101 of 1,000]"
    )
    assert "guessed 3 of 4 right" in summary(_answer(drafted=4, accepted=3), 50)
    assert "stopped at --max-new-tokens 11" in summary(_answer(finish_reason="length"), 11)
    full = _answer(finish_reason="length", context_tokens=1000)
    assert "context is full" in summary(full, 50)


def test_meter() -> None:
    assert meter(0, 100) == "▕░░░░░░░░░░░░▏ 0 of 100"
    assert meter(1, 100).startswith("▕█░")
    assert meter(150, 100).startswith("▕████████████▏")


def _pending() -> PendingCall:
    def add(a: int, b: int) -> int:
        """Sum."""
        return a + b

    return PendingCall(ToolCall("add", {"a": 1, "b": 2}), tool_of(add))


@pytest.mark.parametrize(
    ("reply", "result", "always"),
    [("y", "3", False), ("YES", "3", False), ("a", "3", True), ("n", DECLINED, False),
     ("", DECLINED, False), ("yellow", DECLINED, False)],
)  # fmt: skip
def test_leave_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reply: str,
    result: str,
    always: bool,
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda *_: reply)
    manner, pending = Manner(), _pending()
    decide(pending, manner)
    assert (pending.result, manner.yes_tools) == (result, always)
    assert "add(a=1, b=2)" in capsys.readouterr().err


def test_a_call_that_is_interrupted_was_not_declined() -> None:
    def endless() -> str:
        raise KeyboardInterrupt

    pending = PendingCall(ToolCall("endless", {}), tool_of(endless))
    with pytest.raises(KeyboardInterrupt):
        decide(pending, Manner(yes_tools=True))
    assert "stopped this call" in pending.result


def test_no_answer_is_no_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object) -> str:
        raise EOFError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", end)
    pending = _pending()
    decide(pending, Manner())
    assert pending.result == DECLINED


def test_without_a_terminal_nothing_runs_unless_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    pending = _pending()
    decide(pending, Manner())
    assert pending.result == DECLINED
    assert "--yes-tools allows it" in capsys.readouterr().err
    decide(pending, Manner(yes_tools=True))
    assert pending.result == "3"
    assert "= 3" in capsys.readouterr().err


def test_letters_that_stdout_lacks_do_not_end_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    PlainScreen().write("é 你\n")
    emit_json({"é": "你"})
    shown, _, document = raw.getvalue().decode("latin-1").partition("\n")
    assert shown == "é ?"
    assert json.loads(document) == {"é": "你"}


def test_what_a_tool_prints_is_not_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    def loud() -> str:
        print("printed")
        return "quiet"

    pending = PendingCall(ToolCall("loud", {}), tool_of(loud))
    decide(pending, Manner(yes_tools=True))
    out = capsys.readouterr()
    assert (out.out, pending.result) == ("", "quiet")
    assert "printed" in out.err


@pytest.mark.parametrize(("allowed", "result"), [(True, "3"), (False, DECLINED)])
def test_scripts_get_calls_and_results(
    capsys: pytest.CaptureFixture[str], allowed: bool, result: str
) -> None:
    class Session:
        loaded = SimpleNamespace(
            checkpoint=SimpleNamespace(path="m", adapter=None), backend=SimpleNamespace(name="b")
        )
        last: Answer | None = None

        def typed_controls(self, text: str) -> list[str]:
            return []

        def send(self, text: str) -> Any:
            pending = _pending()
            yield "It is "
            yield pending
            yield pending.result
            said = "It is " + pending.result
            self.last = _answer(text=said, calls=((pending.call, pending.result),))

    chat._answer_once(Session(), "1 + 2?", Manner(yes_tools=allowed), True)  # type: ignore[arg-type]
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == f"It is {result}"
    call = {"name": "add", "arguments": {"a": 1, "b": 2}, "result": result}
    assert document["tool_calls"] == [call]


class _Session:
    """Says a piece, and presses Ctrl-C while it computes the next one."""

    last = None

    def __init__(self) -> None:
        self.finished_step = False

    def send(self, text: str) -> Any:
        yield "one"
        os.kill(os.getpid(), signal.SIGINT)
        self.finished_step = True
        yield " two"
        raise AssertionError("it goes on")


def test_ctrl_c_lets_a_step_finish(capsys: pytest.CaptureFixture[str]) -> None:
    session = _Session()
    with pytest.raises(KeyboardInterrupt):
        stream_answer(session, "x", Manner())  # type: ignore[arg-type]
    assert session.finished_step
    assert capsys.readouterr().out == "one two\n"


def test_pressed_twice_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[bool] = []

    def press_twice() -> None:
        with interruptible() as pressed:
            os.kill(os.getpid(), signal.SIGINT)
            seen.extend(pressed)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert seen == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_no_markdown_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert isinstance(chat_turn.open_screen(markdown=True), PlainScreen)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert isinstance(chat_turn.open_screen(markdown=True), MarkdownScreen)
    assert isinstance(chat_turn.open_screen(markdown=False), PlainScreen)
