"""``--weight-bits``: taken by the backend that has it, one line from those that have not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run_cli import run_cli, run_json
from tests.tiny_checkpoint import write_tiny_checkpoint

OPTIONS = ("--prompt", "the cat", "--max-new-tokens", "6", "--greedy")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(path)
    return path


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_torch_says_which_bits_it_has(command: str, model_dir: Path) -> None:
    pytest.importorskip("torch")
    torch = (command, model_dir, "--backend", "torch", "--weight-bits")
    if command == "chat":
        assert run_json(*torch, "8", *OPTIONS)["tokens"] == 6
        said = run_cli(*torch, "8", *OPTIONS).stderr
        assert "take as much memory as without --weight-bits" in said
    odd = run_cli(*torch, "3", *(OPTIONS if command == "chat" else ("--port", "0")))
    assert odd.returncode != 0
    assert "4 or 8 bits, not to 3" in odd.stderr.splitlines()[-1]
    assert "Traceback" not in odd.stderr


def test_mlx_says_that_it_has_none(model_dir: Path) -> None:
    pytest.importorskip("mlx.core")
    done = run_cli("chat", model_dir, *OPTIONS, "--backend", "mlx", "--weight-bits", "4")
    assert done.returncode != 0
    assert "does not quantise weights itself" in done.stderr.splitlines()[-1]
