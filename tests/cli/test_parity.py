"""``qwen2kit parity`` on a tiny model and, where present, on the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2kit.backend.registry import installed
from tests.run_cli import run_cli, run_json
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if set(installed()) < {"torch", "mlx"}:
        pytest.skip("needs both backends")
    path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(path)
    return path


def test_all_implementations_agree(model_dir: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("mlx_lm")
    document = run_json("parity", model_dir, "--greedy", "16", "--max-tokens", "120", cold=True)
    assert document["implementations"] == ["mlx", "torch", "mlx-lm", "transformers"]
    assert document["not_applicable"] == {}
    assert document["passed"]
    assert len(document["pairs"]) == 6
    for pair in document["pairs"]:
        assert 0 < pair["total"]["max_abs"] < 1e-4
        assert pair["total"]["top1_agreement"] == 1
        assert pair["prompts"]["long-120"]["positions"] == 120
        assert all(run["identical"] for run in pair["greedy"].values())
        assert pair["greedy"]["english"]["length"] == 16


def test_beyond_tolerance_is_exit_code_7(model_dir: Path) -> None:
    done = run_cli("parity", model_dir, "--peers", "none", "--tolerance", "0", "--json")
    assert done.returncode == 7
    assert not json.loads(done.stdout)["passed"]
    assert done.stderr.splitlines()[-1].startswith("error: mlx and torch differ by up to ")
    assert "FAIL" in done.stderr


@pytest.mark.real_model
@pytest.mark.slow
def test_backends_agree_on_the_real_model(real_gguf: Path) -> None:
    if set(installed()) < {"torch", "mlx"}:
        pytest.skip("needs both backends")
    document = run_json("parity", real_gguf, "--greedy", "16", cold=True)
    assert document["passed"]
    assert set(document["not_applicable"]) == {"transformers", "mlx-lm"}
    (pair,) = document["pairs"]
    assert pair["total"]["max_abs"] < 1e-3
    assert all(run["identical"] for run in pair["greedy"].values())
