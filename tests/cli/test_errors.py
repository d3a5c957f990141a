"""Bad input through the real command line: one line that says what is wrong, no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen2kit.backend.registry import installed
from tests.run_cli import run_cli
from tests.tiny_checkpoint import write_tiny_checkpoint

MODEL_COMMANDS = {
    "inspect": ["inspect", "{model}"],
    "chat": ["chat", "{model}", "--prompt", "hi"],
    "parity": ["parity", "{model}"],
    "convert": ["convert", "{model}", "{out}"],
    "eval": ["eval", "{model}", "--tasks", "arc_easy", "--datasets", "{data}"],
    "train": ["train", "sft-small", "model.checkpoint={model}", "--run-dir", "{out}"],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    write_tiny_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def broken(good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that are wrong in one way each."""
    root = tmp_path_factory.mktemp("broken")
    paths = {
        "absent": root / "no-such-model",
        "empty": root / "empty",
        "file": root / "model.bin",
        "gguf": root / "mislabelled.gguf",
    }
    paths["empty"].mkdir()
    paths["file"].write_bytes(b"x")
    shutil.copy(good / "model.safetensors", paths["gguf"])
    for name in ("weightless", "truncated", "unknown-key", "not-json", "other-family", "pickle"):
        paths[name] = root / name
        shutil.copytree(good, paths[name])
    weights = (good / "model.safetensors").read_bytes()
    (paths["weightless"] / "model.safetensors").unlink()
    (paths["truncated"] / "model.safetensors").write_bytes(weights[:-1000])
    (paths["pickle"] / "model.safetensors").rename(paths["pickle"] / "pytorch_model.bin")
    config = json.loads((good / "config.json").read_text())
    _write(paths["unknown-key"], config | {"attention_sink_size": 4})
    _write(paths["other-family"], config | {"model_type": "llama"})
    (paths["not-json"] / "config.json").write_text("{")
    return paths


def _write(directory: Path, config: dict[str, object]) -> None:
    (directory / "config.json").write_text(json.dumps(config))


def assert_one_error_line(
    *args: str | Path, says: str, code: int | None = None, cwd: Path | None = None, hide: str = ""
) -> None:
    """The command fails with exactly one line on stderr, ``error: ...`` containing ``says``."""
    done = run_cli(*args, cwd=cwd, hide=hide)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert done.returncode != 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(errors) == 1, done.stderr
    assert lines[-1] == errors[0], done.stderr
    assert says in errors[0], done.stderr
    assert done.stdout == ""
    if code is not None:
        assert done.returncode == code


@pytest.mark.parametrize(
    ("command", "model", "says"),
    [
        *((command, "truncated", "truncated") for command in MODEL_COMMANDS),
        # eval stops at its data, before any model
        *((command, "absent", "no-such-model") for command in MODEL_COMMANDS if command != "eval"),
    ],
)
def test_every_command_refuses_a_bad_model(
    command: str, model: str, says: str, broken: dict[str, Path], tmp_path: Path
) -> None:
    if not installed():
        pytest.skip("no backend installed")
    if command == "eval":
        pytest.importorskip("lm_eval")
    data = tmp_path / "data"
    data.mkdir()
    fill = {"model": broken[model], "out": tmp_path / "out", "data": data}
    args = [part.format(**fill) for part in MODEL_COMMANDS[command]]
    # eval checks its data before the model, so that a long load is never in vain
    expected = "arc_easy" if command == "eval" else says
    assert_one_error_line(*args, says=expected, cwd=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "code", "says"),
    [
        ("empty", 3, "not a model directory"),
        ("file", 3, "not .gguf"),
        ("gguf", 3, "GGUF"),
        ("weightless", 3, "safetensors"),
        ("pickle", 3, "pickle weights"),
        ("unknown-key", 2, "attention_sink_size"),
        ("other-family", 2, "llama"),
        ("not-json", None, "config.json"),
    ],
)
def test_bad_models(model: str, code: int | None, says: str, broken: dict[str, Path]) -> None:
    assert_one_error_line("inspect", broken[model], says=says, code=code)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["inspect", "qwen2-900b"], 3, "presets: tiny"),
        (["inspect"], 2, "Missing argument"),
        (["frobnicate"], 2, "frobnicate"),
        (["chat", "{good}", "--prompt", "x", "--backend", "tpu"], 8, "unknown backend 'tpu'"),
        (["chat", "{good}", "--prompt", "x", "--device", "tpu:9"], 8, "tpu:9"),
        (["chat", "{good}", "--prompt", "x", "--dtype", "int3"], 2, "int3"),
        (["chat", "{good}", "--prompt", "x", "--temperature", "-1"], 2, "temperature"),
        (["chat", "{good}", "--prompt", "x", "--top-p", "2"], 2, "top_p"),
        (["chat", "{good}", "--prompt", "x", "--max-new-tokens", "0"], 2, "max_new_tokens"),
        (["chat", "{good}", "--prompt", "x", "--max-new-tokens", "many"], 2, "--max-new-tokens"),
        (["chat", "{good}", "--prompt", "x", "--greedy", "--temperature", "1"], 2, "contradict"),
        (["chat", "{good}", "--prompt", ""], 2, "empty"),
        (["chat", "{good}", "--prompt", "word " * 400], 2, "context holds 256"),
        (["chat", "{good}"], 2, "stdin is empty"),
        (["chat", "--nonsense"], 2, "--nonsense"),
        (["chat", "someone/absent-model", "--prompt", "x"], 3, "hub cannot be reached"),
        (["parity", "{good}", "--backends", "tpu"], 8, "unknown backend 'tpu'"),
        (["parity", "{good}", "--peers", "vllm"], 8, "unknown peer 'vllm'"),
        (["parity", "{good}", "--tolerance", "-1"], 2, "--tolerance"),
        (["parity", "{good}", "--max-tokens", "9999"], 2, "context of 256"),
        (["parity", "{good}", "--dtype", "int3"], 2, "int3"),
        (["parity", "{good}", "--backends", "torch", "--peers", "none"], 2, "two implementations"),
        (["convert", "{good}", "out", "--bits", "5", "--to", "mlx"], None, "5"),
        (["convert", "{good}", "{good}"], None, ""),
        (["train", "no-such-recipe"], 2, "no-such-recipe"),
        (["train", "tiny", "train.stepz=3"], 2, "stepz"),
        (["train", "tiny", "model.preset=qwen9"], 2, "qwen9"),
        (["train", "--resume", "nowhere"], 2, "nowhere"),
        (["eval", "{good}", "--tasks", "mmlu", "--limit", "-3"], 2, "limit"),
        (["eval"], 2, "name a model"),
        (["demo", "train.stepz=3"], 2, "stepz"),
        (["demo", "eval.questions=0"], 2, "eval.questions"),
    ],
)
def test_bad_options(
    args: list[str], code: int | None, says: str, good: Path, tmp_path: Path
) -> None:
    if args[0] == "eval":
        pytest.importorskip("lm_eval")
    if not installed():
        pytest.skip("no backend installed")
    assert_one_error_line(
        *(arg.format(good=good) for arg in args), says=says, code=code, cwd=tmp_path
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "hide", "says"),
    [
        (["chat", "{good}", "--prompt", "x", "--backend", "torch"], "torch", "'qwen2kit[torch]'"),
        (["chat", "{good}", "--prompt", "x", "--backend", "mlx"], "mlx", "'qwen2kit[mlx]'"),
        (["chat", "{good}", "--prompt", "x"], "torch,mlx", "'qwen2kit[all]'"),
        (["eval", "{good}", "--tasks", "mmlu"], "lm_eval", "'qwen2kit[eval]'"),
        (["train"], "torch,mlx", "pip install"),
        (["demo"], "torch,mlx", "pip install"),
        (["train", "tiny", "logging.tensorboard=true"], "tensorboard", "'qwen2kit[tensorboard]'"),
    ],
)
def test_missing_extras(args: list[str], hide: str, says: str, good: Path, tmp_path: Path) -> None:
    filled = [arg.format(good=good) for arg in args]
    assert_one_error_line(*filled, hide=hide, says=says, code=8, cwd=tmp_path)


def test_parity_without_frameworks(good: Path) -> None:
    assert_one_error_line("parity", good, hide="torch,mlx", says="two implementations", code=2)
    named = ("parity", good, "--backends", "torch,mlx")
    assert_one_error_line(*named, hide="torch", says="'qwen2kit[torch]'", code=2)


def test_unwritable_output(good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    assert_one_error_line("convert", good, out, says="file")


def test_help_needs_no_framework() -> None:
    for args in ([], ["--help"], ["chat", "--help"], ["demo", "--help"]):
        done = run_cli(*args, hide="torch,mlx,transformers,lm_eval")
        assert done.returncode == 0, done.stderr
        assert "qwen2kit" in done.stdout


@pytest.mark.parametrize("words", [[], ["serve"], ["launch", "slurm"]], ids=" ".join)
def test_a_wrong_option_names_the_help_of_its_command(words: list[str]) -> None:
    done = run_cli(*words, "--nosuch")
    assert done.returncode == 2
    assert done.stderr.endswith(f"(see {' '.join(['qwen2kit', *words])} --help)\n")
    assert done.stderr.count("\n") == 1
