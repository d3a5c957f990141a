"""``qwen2kit train`` end to end on scaled-down shipped recipes: run, stop, resume, refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from qwen2kit.cli.app import app
from qwen2kit.errors import Qwen2KitError
from tests.run_cli import OFFLINE, run_cli
from tests.tiny_checkpoint import write_tiny_checkpoint

torch = pytest.importorskip("torch")

SMALL = (
    "model.hidden_size=64", "model.intermediate_size=96", "model.num_hidden_layers=2",
    "model.num_attention_heads=2", "model.num_key_value_heads=1", "seq_len=96",
    "data.questions=400", "model.vocab_size=400", "train.batch_rows=2",
    "train.micro_batch_rows=2", "eval.questions=6", "eval.max_rows=4",
)  # fmt: skip


def train(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_cli("train", *args, **options)


def refusal(*args: str | Path) -> str:
    """The message `train` is refused with, without paying for a new process."""
    command = typer.main.get_command(app)
    with pytest.raises(Qwen2KitError) as caught:
        command.main(["train", *map(str, args)], standalone_mode=False)
    message = str(caught.value)
    assert "\n" not in message
    return message


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["event"] == "step"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe, scaled down: 8 steps, a checkpoint every 3."""
    path = tmp_path_factory.mktemp("train") / "run"
    done = train(
        "tiny", *SMALL, "train.steps=8", "checkpoint.every=3", "checkpoint.keep=3",
        "--run-dir", path, "--json", cold=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["status"], result["step"], result["total_steps"]) == ("finished", 8, 8)
    assert result["before"]["questions"] == result["after"]["questions"] == 6
    assert "exact match" in done.stderr
    return path


def test_run_directory_holds_everything(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()}
    assert {
        "run.json", "metrics.jsonl", "start", "initial", "model", "checkpoints", "loss.png"
    } <= names  # fmt: skip
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert checkpoints == ["step-00000003", "step-00000006", "step-00000008"]
    for path in (run_dir / "checkpoints").iterdir():
        names = {file.name for file in path.iterdir()}
        assert {"files-00000.json", "state.json"} <= names
        assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    run = json.loads((run_dir / "run.json").read_text())
    assert run["schema_version"] == 1
    assert run["status"] == "finished"
    provenance = run["provenance"]
    assert provenance["config"]["train"]["steps"] == 8
    assert provenance["versions"]["torch"] == torch.__version__
    assert len(losses(run_dir)) == 8
    assert losses(run_dir)[-1] < losses(run_dir)[0]


def test_transformers_loads_the_export(run_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from qwen2kit.backend.loading import load_model
    from qwen2kit.backend.plan import ExecutionPlan

    ours = load_model(run_dir, backend="torch", plan=ExecutionPlan(device="cpu", dtype="float32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "model")
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    ids = ours.tokenizer.encode_chat(messages)
    assert tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    ) == list(ids)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ours.model.logits(ids), expected, atol=1e-4)
    ends = [ours.tokenizer.im_end_id, ours.tokenizer.eot_id]
    assert theirs.generation_config.eos_token_id == ends
    assert theirs.config.eos_token_id == ours.tokenizer.im_end_id
    assert list(ours.sampling().stop_token_ids) == ends


def test_mlx_lm_loads_the_export(run_dir: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    mx = pytest.importorskip("mlx.core")
    from qwen2kit.backend.loading import load_model
    from qwen2kit.backend.plan import ExecutionPlan

    ours = load_model(run_dir, backend="torch", plan=ExecutionPlan(device="cpu", dtype="float32"))
    model, _ = mlx_lm.load(str(run_dir / "model"))
    ids = ours.tokenizer.encode_chat([{"role": "user", "content": "What is 3 + 4?"}])
    with mx.stream(mx.cpu):
        expected = np.array(model(mx.array([ids]))[0].astype(mx.float32))
    np.testing.assert_allclose(ours.model.logits(ids), expected, atol=1e-3)


@pytest.mark.parametrize("step", [3, 6])
def test_resume_repeats_the_same_losses_and_weights(
    step: int, run_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(run | {"status": "running"}))
    done = train("--resume", copy, "--json")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {step} of 8" in done.stderr
    assert losses(copy) == losses(run_dir)
    ours, theirs = (p / "model" / "model.safetensors" for p in (copy, run_dir))
    assert ours.read_bytes() == theirs.read_bytes()
    result = json.loads(done.stdout)
    assert result["before"] == run["before"]
    assert result["after"] == run["after"]


def test_resume_refuses_what_it_should(run_dir: Path, tmp_path: Path) -> None:
    cases: dict[str, tuple[str | Path, ...]] = {
        "nothing to do": ("--resume", run_dir),
        "not a run directory": ("--resume", tmp_path),
        "not both": ("--resume", run_dir, "--run-dir", tmp_path),
        "needs --resume": ("--allow-changes",),
        "is not empty": ("tiny", "--run-dir", run_dir),
    }
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(run | {"status": "stopped"}))
    cases["differs from that of .* in train.lr, train.seed;"] = (
        "--resume", copy, "train.lr=1e-5", "train.seed=3"
    )  # fmt: skip
    for message, args in cases.items():
        assert re.search(message, refusal(*args)), message


def test_more_steps_with_allowed_changes_and_a_corrupt_newest(
    run_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    newest = next((copy / "checkpoints" / "step-00000008").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-50])
    done = train("--resume", copy, "train.steps=9", "--allow-changes", "--json")
    assert done.returncode == 0, done.stderr
    assert "step-00000008 is damaged" in done.stderr
    assert json.loads(done.stdout)["step"] == 9
    assert losses(copy)[:6] == losses(run_dir)[:6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_can_go_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    args = [
        sys.executable, "-m", "qwen2kit", "train", "tiny", *SMALL, "train.steps=100000",
        "eval.questions=0", "checkpoint.initial=false", "checkpoint.every=0",
        "--run-dir", str(path),
    ]  # fmt: skip
    env = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, env=env)
    metrics = path / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count('"step"') > 4:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 128 + number, stderr
    assert f"stopped by {number.name} after step" in stderr
    assert "Traceback" not in stderr
    run = json.loads((path / "run.json").read_text())
    assert run["status"] == "stopped"
    assert not (path / "model").exists()
    total = run["step"] + 2
    done = train("--resume", path, f"train.steps={total}", "--allow-changes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == total


@pytest.mark.parametrize("begun", [False, True])
def test_a_signal_before_training_is_one_line(begun: bool, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from qwen2kit.cli.train_signals import answered

with answered(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGUSR1 if len(sys.argv) > 2 else signal.SIGTERM)
"""
    if begun:
        (tmp_path / "run.json").write_text("{}")
    for number, more in ((signal.SIGTERM, []), (signal.SIGUSR1, ["x"])):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), *more],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 128 + number
        assert done.stderr.count("\n") == 1
        assert f"stopped by {number.name} before training " in done.stderr
        assert (f"qwen2kit train --resume {tmp_path}" in done.stderr) == begun


def test_a_signal_after_the_run_changes_no_exit_code() -> None:
    code = """
import os, signal
from qwen2kit.cli.train_signals import answered

with answered(None):
    pass
os.kill(os.getpid(), signal.SIGTERM)
print("over")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


def test_nan_stops_with_one_line_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    common = (*SMALL, "train.lr=1e30", "eval.questions=0", "train.optimizer.max_grad_norm=0.0")
    done = train(
        "tiny", *common, "train.steps=30", "train.schedule.kind=constant", "checkpoint.every=1",
        "--run-dir", path,
    )  # fmt: skip
    assert done.returncode == 6
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: step ")
    assert "lower train.lr" in last
    assert list((path / "checkpoints").iterdir())
    assert json.loads((path / "run.json").read_text())["status"] == "failed"
    done = train(
        "tiny", *common, "train.steps=6", "train.schedule.kind=constant",
        "train.non_finite=skip", "--run-dir", tmp_path / "skip", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skipped"] >= 1


@pytest.mark.parametrize("recipe", ["pretrain", "long-context", "sft", "sft-small"])
def test_the_other_shipped_recipes_run_scaled_down(recipe: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "base"
    write_tiny_checkpoint(checkpoint, max_position_embeddings=256)
    rows = [
        {
            "text": f"the cat sat on mat {i}. " * 9,
            "instruction": "what is the answer?",
            "input": str(i),
            "output": "the cat " * (i % 4 + 1),
            "messages": [
                {"role": "user", "content": f"one two {i}"},
                {"role": "assistant", "content": "three four"},
            ],
        }
        for i in range(40)
    ]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    overrides = [f"data.paths=['{data}']", "train.steps=2", "seq_len=128", "dtype=float32"]
    overrides += ["train.batch_rows=4", "train.micro_batch_rows=2", f"output_dir={tmp_path}"]
    if recipe == "long-context":
        overrides += ["model.max_position_embeddings=128", "long.fraction=0.5", "long.seq_len=256"]
    if recipe in ("pretrain", "long-context"):
        overrides += ["model.preset=tiny", f"model.tokenizer={checkpoint}", "eval.fraction=0.2"]
    else:
        overrides += [f"model.checkpoint={checkpoint}"]
    done = train(recipe, *overrides, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "finished"
    assert result["after"]["loss"] < result["before"]["loss"]
    assert (Path(result["model_dir"]) / "generation_config.json").is_file()


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text("extends = ['tiny']\n[train]\nlrr = 1\n[data]\nkind = 'csv'\n")
    bad_data = tmp_path / "rows.jsonl"
    bad_data.write_text('{"messages": 3}\n')
    sft = (f"data.paths=['{bad_data}']", "model.preset=tiny", "model.tokenizer=train")
    cases: dict[str, tuple[str | Path, ...]] = {
        "bad.toml: data.kind must be one of .*train.lrr: unknown key": (recipe,),
        "no recipe 'nope'": ("nope",),
        "must look like": ("tiny", "steps"),
        "seq_len=4096 exceeds the model's max_position": ("tiny", "seq_len=4096"),
        "no file matches": ("sft", *sft[1:], "seq_len=64"),
        "rows.jsonl, row 1: 'messages' must be a non-empty list": ("sft", *sft, "seq_len=64"),
        "unknown backend 'jax'": ("tiny", "backend=jax"),
        "no device 'tpu'": ("tiny", "device=tpu"),
        "vocab_size must be at least 259": ("tiny", "model.vocab_size=100"),
        "unknown preset 'huge'": ("tiny", "model.preset=huge"),
    }

    for message, args in cases.items():
        assert re.search(message, refusal(*args, f"output_dir={tmp_path / 'runs'}")), message
