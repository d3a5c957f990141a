"""``qwen2kit inspect`` against published numbers and against what was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run_cli import run_cli, run_json
from tests.tiny_checkpoint import VOCAB, write_tiny_checkpoint


@pytest.mark.parametrize(
    ("preset", "total", "kv_bytes"),
    [("qwen2-0.5b", 494_032_768, 12_288), ("Qwen2-7B", 7_615_616_512, 57_344)],
)
def test_preset(preset: str, total: int, kv_bytes: int) -> None:
    document = run_json("inspect", preset, cold=True)
    assert document["parameters"]["total"] == total
    assert document["kv_bytes_per_token"]["bfloat16"] == kv_bytes


def test_checkpoint(tmp_path: Path) -> None:
    spec = write_tiny_checkpoint(tmp_path)
    document = run_json("inspect", tmp_path)
    assert document["format"] == "hf"
    assert document["dtype"] == "float32"
    assert document["quantization"] is None
    assert document["spec"]["hidden_size"] == spec.hidden_size
    assert document["tokenizer"]["vocab_size"] == VOCAB
    assert document["tokenizer"]["embedding_rows"] == VOCAB + 8
    assert document["tokenizer"]["default_system"] == "You are a helpful assistant."
    assert set(document["stop_tokens"].values()) == {"<|im_end|>", "<|endoftext|>"}
    size = (tmp_path / "model.safetensors").stat().st_size
    assert document["files"]["model.safetensors"] == size
    assert 0 < size - 4 * document["parameters"]["total"] < 10_000  # the header


def test_table_is_for_people(tmp_path: Path) -> None:
    done = run_cli("inspect", "qwen2-0.5b")
    assert done.returncode == 0
    assert done.stdout == ""
    assert "494,032,768" in done.stderr


@pytest.mark.real_model
def test_real_model(real_gguf: Path) -> None:
    document = run_json("inspect", real_gguf)
    assert document["format"] == "gguf"
    assert document["parameters"]["total"] == 494_032_768
    assert document["tokenizer"]["default_system"].startswith("You are Qwen")
    assert document["stop_tokens"] == {"151645": "<|im_end|>", "151643": "<|endoftext|>"}
