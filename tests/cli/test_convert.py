"""``qwen2kit convert`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2kit.backend import registry
from qwen2kit.backend.registry import installed
from qwen2kit.cli.convert import parse_size
from qwen2kit.cli.convert_quality import Quality
from qwen2kit.errors import ConfigError, MissingExtra
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.convert import convert
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "model"
    write_tiny_checkpoint(folder)
    return folder


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen2kit", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def test_a_table_for_people_and_nothing_on_stdout(model: Path, tmp_path: Path) -> None:
    result = _run(model, tmp_path / "out", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "bfloat16" in result.stderr
    assert "38 tensors" in result.stderr
    assert open_checkpoint(tmp_path / "out").dtype == "bfloat16"


@pytest.mark.skipif(not installed(), reason="no backend installed")
def test_verified_conversion_as_json(model: Path, tmp_path: Path) -> None:
    result = _run(model, tmp_path / "m.gguf", "--verify", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["format"] == "gguf"
    assert document["quantization"] == "f32"
    assert document["verify"]["passed"] is True
    assert document["verify"]["lossless"] is True
    assert len(document["verify"]["logits"]) == 2 * len(installed()) - 1


@pytest.mark.skipif(not installed(), reason="no backend installed")
def test_quantising_reports_its_loss_and_keeps_it(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _run(model, out, "--to", "mlx", "--bits", "4", "--group-size", "32", "--json")
    assert result.returncode == 0, result.stderr
    quality = json.loads(result.stdout)["quality"]
    assert quality == json.loads((out / "qwen2kit.json").read_text())["quality"]
    assert quality["original"]["kl"] == 0 < quality["converted"]["kl"]
    assert quality["tokens"] > 500
    for heading in ("bits/weight", "perplexity", "KL (nats)", "top-1"):
        assert heading in result.stderr


@pytest.mark.skipif(not installed(), reason="no backend installed")
def test_loss_on_a_text_of_ones_own_and_on_none(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran")
    result = _run(model, tmp_path / "m.gguf", "--gguf-type", "q8_0", "--report", text)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "m.gguf.qwen2kit.json").read_text())
    assert record["quality"]["text"] == str(text)
    quantise = ("--to", "mlx", "--bits", "8", "--group-size", "32")
    result = _run(model, tmp_path / "out", *quantise, "--no-report", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["quality"] is None
    assert "perplexity" not in result.stderr


def test_a_loss_that_cannot_be_measured_is_a_note_unless_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "entries", lambda group: {})
    source = open_checkpoint(model)
    convert(source, tmp_path / "out", to="mlx", quantize_bits=4, group_size=32)
    silent = Quality.asked(source, None, False, True)
    assert silent is not None
    assert "pip install" in silent.measure(tmp_path / "out")["not_measured"]
    assert "not_measured" in (tmp_path / "out/qwen2kit.json").read_text()
    silent.print()
    assert "note: loss not measured" in capsys.readouterr().err
    asked = Quality.asked(source, "auto", False, True)
    assert asked is not None
    with pytest.raises(MissingExtra):
        asked.measure(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report", "absent.txt"], "absent.txt: cannot be read"),
        (["--report", "auto", "--no-report"], "contradict"),
    ],
)
def test_a_report_that_cannot_be_made_stops_before_converting(
    model: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = _run(model, tmp_path / "out", *options)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(len(installed()) < 2, reason="needs two backends")
def test_a_tolerance_that_cannot_be_met_fails_with_code_7(model: Path, tmp_path: Path) -> None:
    result = _run(model, tmp_path / "out", "--verify", "--tolerance", "0", "--json")
    assert result.returncode == 7
    assert "tolerance 0" in result.stderr.splitlines()[-1]
    assert json.loads(result.stdout)["verify"]["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "onnx"], 2, "--to must be hf, mlx or gguf"),
        (["--bits", "4"], 2, "for --to mlx"),
        (["--to", "mlx", "--bits", "5"], 2, "bits must be one of"),
        (["--dtype", "int4"], 2, "dtype must be one of"),
        (["--max-shard-size", "big"], 2, "must look like 5GB"),
        (["--tolerance", "nan"], 2, "--tolerance"),
    ],
)
def test_wrong_options_are_one_line(
    model: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    result = _run(model, tmp_path / "out", *arguments)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_model_and_an_existing_output(model: Path, tmp_path: Path) -> None:
    result = _run(tmp_path / "absent", tmp_path / "out")
    assert result.returncode == 3
    assert "no such file or directory" in result.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    result = _run(model, tmp_path / "out")
    assert result.returncode == 2
    assert "--force" in result.stderr
    assert _run(model, tmp_path / "out", "--force").returncode == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("1024", 1024), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5GB", "5TB", "GB", "1e9", "0.1B"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text)
