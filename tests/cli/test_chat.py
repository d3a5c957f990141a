"""``qwen2kit chat``: one shot, pipe, JSON, and the interactive loop."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2kit.backend.registry import installed
from qwen2kit.cli import chat_loop
from qwen2kit.errors import BackendError
from tests.run_cli import ALL_THREADS, run_cli, run_json
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
    shot = run_cli("chat", model_dir, "--prompt", "the cat", *options)
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


class _Session:
    """Stands in for ChatSession in the loop's tests."""

    def __init__(self) -> None:
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []
        self.last = None
        self.sent: list[str] = []

    def reset(self) -> None:
        self.messages.clear()

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


def test_loop_survives_interrupts_and_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = _converse(
        monkeypatch, "interrupt", "fail", KeyboardInterrupt(), "go on", "/exit", "never"
    )
    assert session.sent == ["interrupt", "fail", "go on"]
    out = capsys.readouterr()
    assert out.out == "paranswer\n"
    assert "interrupted; the conversation goes on" in out.err
    assert "error: it broke" in out.err


def test_ctrl_c_in_one_shot_mode_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys
    import time

    os.mkfifo(tmp_path / "pipe")
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen2kit", "chat", str(model_dir)],
        stdin=os.open(tmp_path / "pipe", os.O_RDWR),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run started in the background hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(2.0)  # it now waits for its input, which never ends
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
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
        "--max-new-tokens", "400", timeout=280, env=ALL_THREADS,
    )  # fmt: skip
    assert document["finish_reason"] == "stop"
    code = document["text"].split("```python")[1].split("```")[0]
    namespace: dict[str, object] = {}
    exec(code, namespace)
    is_prime = namespace["is_prime"]
    assert callable(is_prime)
    assert [n for n in range(30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
