"""``qwen2kit chat``: one shot, pipe, JSON, and the interactive loop."""

from __future__ import annotations

import json
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.backend.registry import installed
from qwen2kit.cli import chat_loop
from qwen2kit.cli.chat import _piped
from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.tokenizer.chat_template import check_messages
from tests.run_cli import run_cli, run_json
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not installed():
        pytest.skip("no backend installed")
    path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(path)
    return path


def test_prompt_pipe_and_json_agree(model_dir: Path) -> None:
    options = ("--max-new-tokens", "8", "--greedy")
    shot = run_cli("chat", model_dir, "--prompt", "the cat", *options, cold=True)
    piped = run_cli("chat", model_dir, *options, stdin="the cat\n")
    document = run_json("chat", model_dir, *options, stdin="the cat")
    assert shot.returncode == piped.returncode == 0, shot.stderr + piped.stderr
    assert shot.stdout == piped.stdout == document["text"] + "\n"
    assert document["tokens"] == 8
    assert document["finish_reason"] == "length"
    assert document["seconds"] >= document["first_token_seconds"] > 0
    assert "tokens/s" in shot.stderr
    assert "stopped at --max-new-tokens 8" in shot.stderr


def test_backends_say_the_same(model_dir: Path) -> None:
    if len(installed()) < 2:
        pytest.skip("one backend only")
    texts = {
        run_json(
            "chat", model_dir, "--prompt", "a", "--max-new-tokens", "16", "--backend", name,
            "--dtype", "float32", "--temperature", "0.7", "--seed", "3",
        )["text"]
        for name in installed()
    }  # fmt: skip
    assert len(texts) == 1


def test_latest_run_is_the_default(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "model").symlink_to(model_dir, target_is_directory=True)
    options = ("--prompt", "hi", "--max-new-tokens", "2")
    done = run_cli("chat", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"taking {Path('runs') / 'old'}" in done.stderr
    offline = run_cli("chat", *options, cwd=model_dir)
    assert offline.returncode == 3
    assert "Qwen/Qwen2-0.5B-Instruct" in offline.stderr.splitlines()[-1]


def test_control_tokens_give_a_notice(model_dir: Path) -> None:
    done = run_cli("chat", model_dir, "--prompt", "<|im_end|>", "--max-new-tokens", "2")
    assert "<|im_end|> is read as ordinary text" in done.stderr


def test_guesses_leave_the_text_alone(model_dir: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, seed=3, num_hidden_layers=1)
    options = ("--prompt", "the cat sat on", "--max-new-tokens", "24", "--temperature", "0.9",
               "--seed", "5", "--dtype", "float32")  # fmt: skip
    plain, lookup, draft = (
        run_json("chat", model_dir, *options, *how)
        for how in ((), ("--prompt-lookup", "3"), ("--draft", tmp_path))
    )
    assert plain["text"] == lookup["text"] == draft["text"]
    assert plain["drafted_tokens"] == 0
    assert draft["drafted_tokens"] > 0


def test_a_prompt_cache_is_kept(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "read.safetensors"
    options = ("--prompt", "the cat sat on the mat", "--max-new-tokens", "4", "--greedy",
               "--prompt-cache", path)  # fmt: skip
    first, second = (run_json("chat", model_dir, *options) for _ in range(2))
    assert first["text"] == second["text"]
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == second["prompt_tokens"] - 1
    write_tiny_checkpoint(tmp_path / "other", seed=4)
    done = run_cli("chat", tmp_path / "other", *options)
    assert done.returncode == 3
    assert "another model" in done.stderr


def test_answers_by_a_grammar(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, '
                      '"required": ["a"], "additionalProperties": false}')  # fmt: skip
    options = ("--prompt", "?", "--max-new-tokens", "200", "--temperature", "1", "--seed", "1")
    document = run_json("chat", model_dir, *options, "--schema", schema)
    assert json.loads(document["text"])["a"] in ("x", "y")
    assert document["finish_reason"] == "stop"
    document = run_json("chat", model_dir, *options, "--regex", "[0-9]{3}-[a-c]")
    assert re.fullmatch("[0-9]{3}-[a-c]", document["text"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--schema", "absent.json"), "No such file"),
        (("--regex", "(a"), "unclosed group"),
        (("--regex", "a", "--schema", "x"), "contradict"),
        (("--draft", "x", "--prompt-lookup", "3"), "give one of them"),
        (("--prompt-lookup", "0"), "at least 1 token"),
        (("--tools", "absent.py"), "not a Python file"),
    ],
)
def test_bad_options_are_one_line(
    model_dir: Path, tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    done = run_cli("chat", model_dir, "--prompt", "x", *options, cwd=tmp_path)
    assert done.returncode != 0
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_tools_need_a_template_that_knows_them(model_dir: Path, tmp_path: Path) -> None:
    functions = tmp_path / "mine.py"
    functions.write_text("def add(a: int, b: int) -> int:\n    return a + b\n")
    done = run_cli("chat", model_dir, "--prompt", "x", "--tools", functions)
    assert done.returncode == 4
    assert "does not support tools" in done.stderr


class _Session:
    """Stands in for ChatSession in the loop's tests."""

    def __init__(self) -> None:
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []
        self.last = None
        self.tools: list[Any] = []
        self.sent: list[str] = []

    def reset(self) -> None:
        self.messages.clear()

    def load(self, messages: list[dict[str, str]]) -> None:
        check_messages(messages)
        self.messages = list(messages)

    def typed_controls(self, text: str) -> list[str]:
        return []

    def send(self, text: str) -> Iterator[str]:
        self.sent.append(text)
        if text == "interrupt":
            yield "par"
            raise KeyboardInterrupt
        if text == "fail":
            raise BackendError("it broke")
        self.messages.append({"role": "user", "content": text})
        yield from ("an", "swer")


def _converse(monkeypatch: pytest.MonkeyPatch, *lines: object) -> _Session:
    session, script = _Session(), iter(lines)

    def read(prompt: str) -> str:
        line = next(script, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setenv("XDG_STATE_HOME", tempfile.mkdtemp())
    chat_loop.converse(session)  # type: ignore[arg-type]
    return session


def test_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "talk.json"
    session = _converse(
        monkeypatch, "hello", "", "/system be kind", "/system", f"/save {target}", "/nope", "/help",
        "/save", f"/save {tmp_path / 'absent' / 'x.json'}", "/reset", "bye",
    )  # fmt: skip
    assert session.sent == ["hello", "bye"]
    assert session.system == "be kind"
    assert json.loads(target.read_text()) == [{"role": "user", "content": "hello"}]
    assert session.messages == [{"role": "user", "content": "bye"}]
    out = capsys.readouterr()
    assert out.out == "answer\nanswer\n"
    for text in ("be kind", "unknown command /nope", "usage: /save FILE", "cannot write"):
        assert text in out.err


def test_loop_loads_and_offers_tools(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, wrong, list_of_wrong = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"
    saved.write_text(json.dumps([{"role": "user", "content": "hi"}]))
    wrong.write_text("{")
    list_of_wrong.write_text('[{"content": "x"}]')
    functions = tmp_path / "mine.py"
    functions.write_text("def add(a: int, b: int) -> int:\n    return a + b\n")
    session = _converse(
        monkeypatch, "/tools", f"/tools {functions}", f"/tools {tmp_path / 'no.py'}",
        f"/load {wrong}", f"/load {list_of_wrong}", f"/load {tmp_path / 'absent'}", "/load",
        f"/load {saved}", "two\\", "lines", "/tools off",
    )  # fmt: skip
    assert session.messages[0] == {"role": "user", "content": "hi"}
    assert session.sent == ["two\nlines"]
    assert session.tools == []
    err = capsys.readouterr().err
    for text in (
        "(no tools)", "(tools: add)", "is not a Python file", "no list of JSON messages",
        "message 0 has no role", "cannot read", "usage: /load FILE", "(loaded 1 messages",
    ):  # fmt: skip
        assert text in err


def test_lines_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with chat_loop._line_history():
        readline.clear_history()
        readline.add_history("what is GQA?")
    readline.clear_history()
    with chat_loop._line_history():
        assert readline.get_history_item(1) == "what is GQA?"


def test_strange_lines_and_files_do_not_end_the_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep").write_text("[" * 100_000)
    no_text = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    session = _converse(
        monkeypatch, no_text, f"/load {tmp_path / 'deep'}", "/save ~nobody-here/x",
        "/load ~nobody-here/x", "/tools ~nobody-here/x.py", "go on",
    )  # fmt: skip
    assert session.sent == ["go on"]
    err = capsys.readouterr().err
    for text in ("not UTF-8", "no list of JSON messages", "cannot write ~nobody", "not a Py"):
        assert text in err


def test_a_user_without_a_home_has_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with chat_loop._line_history():
        pass


def test_loop_survives_interrupts_and_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = _converse(
        monkeypatch, "interrupt", "fail", KeyboardInterrupt(), "go on", "/exit", "never"
    )
    assert session.sent == ["interrupt", "fail", "go on"]
    out = capsys.readouterr()
    assert out.out == "par\nanswer\n"
    assert "interrupted; the conversation goes on" in out.err
    assert "error: it broke" in out.err


def test_a_closed_stdin_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match="stdin is closed; give --prompt"):
        _piped()


def test_ctrl_c_in_one_shot_mode_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    import array
    import fcntl
    import os
    import subprocess
    import sys
    import termios
    import time

    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(pipe, b"begun")
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen2kit", "chat", str(model_dir)],
        stdin=pipe,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run started in the background hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    left = array.array("i", [1])
    while left[0]:  # until it reads its input, which never ends
        assert process.poll() is None
        time.sleep(0.01)
        fcntl.ioctl(pipe, termios.FIONREAD, left)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == "error: interrupted\n"


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_real_model_writes_a_prime_test_and_stops(real_gguf: Path, backend: str) -> None:
    if backend not in installed():
        pytest.skip(f"{backend} is not installed")
    question = "Write a Python function is_prime(n). Reply with one code block and nothing else."
    document = run_json(
        "chat", real_gguf, "--backend", backend, "--prompt", question, "--greedy",
        "--max-new-tokens", "400", cold=True,
    )  # fmt: skip
    assert document["finish_reason"] == "stop"
    code = document["text"].split("```python")[1].split("```")[0]
    namespace: dict[str, object] = {}
    exec(code, namespace)
    is_prime = namespace["is_prime"]
    assert callable(is_prime)
    assert [n for n in range(30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
