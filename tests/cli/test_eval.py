"""``qwen2kit eval`` and ``python -m qwen2kit_evals``: a whole run, and every refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2kit.backend.registry import installed
from qwen2kit.cli.app import main
from qwen2kit.errors import ConfigError
from tests.eval_tasks import write_tasks
from tests.packed_checkpoint import Kind, write_packed_checkpoint
from tests.run_cli import OFFLINE, run_cli
from tests.tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not installed():
        pytest.skip("no backend installed")
    home = tmp_path_factory.mktemp("eval")
    write_tiny_checkpoint(home / "model")
    write_tasks(home / "tasks")
    return home


@pytest.mark.slow
def test_a_run_writes_its_results_and_prints_them(home: Path) -> None:
    done = run_cli(
        "eval", home / "model", "--tasks", "tiny_choice,tiny_generate",
        "--include-path", home / "tasks", "--limit", "2", "--num-fewshot", "1",
        "--dtype", "float32", "--json",
        cwd=home, env={"HF_DATASETS_CACHE": str(home / "cache")}, cold=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    output = home / document["output"]
    assert output.parent == home / "eval-results"
    assert json.loads((output / "results.json").read_text()) == document
    assert {row["task"] for row in document["results"]} == {"tiny_choice", "tiny_generate"}
    assert all(row["samples"] == 2 and row["shots"] == 1 for row in document["results"])
    assert document["provenance"]["model"]["dtype"] == "float32"
    assert len((output / "samples_tiny_choice.jsonl").read_text().splitlines()) == 2
    assert "exact_match" in done.stderr
    assert "written to" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_task_that_does_not_fit_is_told_at_the_end(home: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", tiny_generate={"generation_kwargs": {"max_gen_toks": 999}})
    done = run_cli(
        "eval", home / "model", "--tasks", "tiny_generate,tiny_choice", "--limit", "2",
        "--include-path", tmp_path / "tasks", "--output", "run", "--json",
        cwd=tmp_path, env={"HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    document = json.loads(done.stdout)
    assert {row["task"] for row in document["results"]} == {"tiny_choice"}
    assert document["failed"][0]["task"] == "tiny_generate"
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == document
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: no scores of tiny_generate: 999 tokens to generate leave no")
    assert "Traceback" not in done.stderr


def test_what_becomes_of_packed_weights_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(*_: object, **__: object) -> None:
        raise ConfigError("loaded")

    monkeypatch.setattr("qwen2kit_evals.run.evaluate", evaluate)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(home / "cache"))
    write_packed_checkpoint(home / "packed", Kind(order="activation"))
    command = ["qwen2kit", "eval", str(home / "packed"), "--tasks", "tiny_choice",
               "--include-path", str(home / "tasks"), "--output", str(home / "told")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        main()
    told, refused = capsys.readouterr().err.splitlines()[-2:]
    assert told.startswith("note: ")
    assert "dequantised on every backend" in told
    assert refused == "error: loaded"


@pytest.mark.slow
def test_lm_evals_own_command_line(home: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "qwen2kit_evals", "run", "--model", "qwen2kit",
            "--model_args", f"pretrained={home / 'model'},dtype=float32,batch_size=2",
            "--tasks", "tiny_generate", "--include_path", str(home / "tasks"), "--limit", "2",
        ],
        capture_output=True, text=True, timeout=900, check=False, cwd=home,
        env={**os.environ, **OFFLINE, "HF_DATASETS_CACHE": str(home / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|tiny_generate|" in done.stdout
    assert "exact_match" in done.stdout


@pytest.mark.slow
def test_unknown_tasks_come_with_close_ones(home: Path) -> None:
    done = run_cli("eval", home / "model", "--tasks", "gsm8kk")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown task 'gsm8kk'; did you mean gsm8k")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "gsm8k"], 2, "name a model"),
        (["m", "--tasks", "gsm8k", "--limit", "0"], 2, "limit must be"),
        (["m", "--tasks", "gsm8k", "--batch-size", "0"], 2, "batch_size must be"),
        (["m", "--tasks", "gsm8k", "--num-fewshot", "-1"], 2, "--num-fewshot must not"),
        (["m", "--tasks", "gsm8k", "--dtype", "fp8"], 2, "dtype must be"),
        (["m", "--tasks", "gsm8k", "--datasets", "nowhere"], 5, "nowhere: no such directory"),
        (["m", "--tasks", "gsm8k", "--include-path", "nowhere"], 2, "no such directory"),
        (["m", "--tasks", "gsm8k", "--output", "full"], 2, "full already exists"),
        (["--list"], 2, "add --datasets DIR"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").write_text("{}")
    done = run_cli("eval", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_missing_extra_names_its_install_command(tmp_path: Path) -> None:
    done = run_cli("eval", "m", "--tasks", "gsm8k", cwd=tmp_path, hide="lm_eval")
    assert done.returncode == 8
    assert "pip install 'qwen2kit[eval]'" in done.stderr
    assert done.stderr.count("\n") == 1
