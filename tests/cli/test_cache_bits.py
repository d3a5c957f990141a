"""``--cache-bits``: taken by the backend that has it, one line from those that have not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run_cli import run_cli, run_json
from tests.tiny_checkpoint import write_tiny_checkpoint

OPTIONS = ("--prompt", "the cat", "--max-new-tokens", "6", "--greedy")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(path, head_dim=32)
    return path


def test_chat_answers_from_a_packed_cache(model_dir: Path) -> None:
    pytest.importorskip("mlx.core")
    mlx = ("chat", model_dir, *OPTIONS, "--backend", "mlx")
    assert run_json(*mlx, "--cache-bits", "8")["tokens"] == 6
    odd = run_cli(*mlx, "--cache-bits", "3")
    assert odd.returncode != 0
    assert "in 4 or 8 bits" in odd.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_torch_says_that_it_has_none(command: str, model_dir: Path) -> None:
    pytest.importorskip("torch")
    options = OPTIONS if command == "chat" else ("--port", "0")
    done = run_cli(command, model_dir, *options, "--backend", "torch", "--cache-bits", "8")
    assert done.returncode != 0
    assert "leave out cache_bits" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
