"""``qwen2kit eval --resume``, ``diff``, ``report``, ``fetch`` and ``contamination``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2kit.backend.registry import installed
from qwen2kit.cli.app import main
from tests.eval_tasks import write_tasks
from tests.run_cli import run_cli, run_json
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.unit.evals.stored_runs import row, sample, write_run

pytest.importorskip("lm_eval")

PAIR = [[-1.0, True], [-2.5, False]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``a`` (all right) and ``b`` (the last wrong) of one task."""
    home = tmp_path_factory.mktemp("runs")
    for name, last in (("a", 1.0), ("b", 0.0)):
        rights = [1.0, 1.0, last]
        samples = [sample(i, {"acc": right}, responses=PAIR) for i, right in enumerate(rights)]
        result = row("qwen2_mmlu", sum(rights) / 3, samples=3)
        write_run(home / name, {"qwen2_mmlu": samples}, [result])
    return home


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_another_directory(tmp_path: Path) -> None:
    if not installed():
        pytest.skip("no backend installed")
    from qwen2kit.backend.loading import load_model
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit_evals.compare import compare_samples
    from qwen2kit_evals.job import Job
    from qwen2kit_evals.run import evaluate
    from qwen2kit_evals.stored_run import read_run
    from qwen2kit_evals.tasks import select_tasks

    write_tiny_checkpoint(tmp_path / "model")
    tasks = write_tasks(tmp_path / "tasks")
    loaded = load_model(str(tmp_path / "model"), plan=ExecutionPlan(dtype="float32"))
    selection = select_tasks(["tiny_choice", "tiny_generate"], include_path=tasks, defaults=False)
    evaluate(loaded, selection, output=tmp_path / "whole", limit=4)
    lines = (tmp_path / "whole/requests.jsonl").read_bytes().splitlines(keepends=True)
    run = tmp_path / "run"
    job = Job(
        model=str(tmp_path / "model"), tasks="tiny_choice,tiny_generate", dtype="float32", limit=4,
        include_path=str(tasks),
    )  # fmt: skip
    job.begin(run)
    (run / "requests.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:5])

    (tmp_path / "elsewhere").mkdir()
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    found = run_json("eval", "--resume", run, cwd=tmp_path / "elsewhere", env=cache)
    counts = found["provenance"]["evaluation"]["requests"]
    assert counts == {"answered": len(lines) - 9, "from_log": 9}
    assert found["results"] == json.loads((tmp_path / "whole/results.json").read_text())["results"]
    resumed = read_run(run).samples
    for task, samples in read_run(tmp_path / "whole").samples.items():
        agreement = compare_samples(resumed[task], samples)
        assert (agreement.documents, agreement.metrics_differ) == (4, 0)
        assert agreement.same_answers
        assert agreement.max_dlogp < 1e-4  # the rest is batched otherwise, so rounds otherwise
    again = run_cli("eval", "--resume", run)
    assert (again.returncode, "is finished, nothing to do" in again.stderr) == (2, True)


def test_diff(runs: Path) -> None:
    document = run_json("eval", "diff", runs / "a", runs / "b")
    (task,) = document["tasks"]
    (metric,) = task["metrics"]
    assert metric["flips"] == [{"doc_id": 2, "gained": False}]
    assert metric["difference"]["delta"] == pytest.approx(-1 / 3)
    assert metric["difference"]["p"] == 1
    shown = run_cli("eval", "diff", runs / "a", runs / "b", hide="lm_eval")
    assert (shown.returncode, shown.stdout) == (0, ""), shown.stderr
    assert "+0 -1" in shown.stderr
    assert "flipped documents: -2" in shown.stderr


def test_report(runs: Path, tmp_path: Path) -> None:
    done = run_cli(
        "eval", "report", runs / "a", runs / "b", "--compare", "qwen2-0.5b",
        "-o", tmp_path / "r.html", "-o", tmp_path / "r.md", hide="lm_eval",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "<h2>a beside the paper</h2>" in (tmp_path / "r.html").read_text()
    assert "subset: 3 of 14,042 questions" in (tmp_path / "r.md").read_text()


@pytest.mark.slow
def test_contamination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    question = json.loads((tasks / "tiny_long.json").read_text().splitlines()[1])["text"]
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": question}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = ["--train", "train.jsonl", "--tasks", "tiny_long", "--include-path", str(tasks)]
    monkeypatch.setattr(
        "sys.argv", ["qwen2kit", "eval", "contamination", *options, "-o", "c.json", "--json"]
    )
    main()
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "c.json").read_text())
    (task,) = found["tasks"]
    assert (task["documents"], 1 in task["ngram"], 1 in task["lcs"]) == (3, True, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["m", "--tasks", "t", "--suite", "qwen2-base"], 2, "exclude each other"),
        (["m", "--suite", "qwen9"], 2, "qwen2-base, qwen2-instruct"),
        (["m", "--tasks", "t", "--compare", "llama"], 2, "no published scores"),
        (["m", "--resume", "x"], 2, "leave model and tasks out"),
        (["--resume", "x"], 2, "no run.json there"),
        (["m", "--tasks", "gsm8k", "--limit", "2", "--output", "begun"], 2, "unfinished run with"),
        (["diff", "x", "y"], 2, "holds no results.json"),
        (["diff", "begun", "y"], 2, "finish it with --resume begun"),
        (["report", "x", "-o", "r.pdf"], 2, "a .html or .md file"),
        (["fetch", "--to", "d"], 2, "--suite or --data"),
        (["fetch", "--to", "d", "--suite", "qwen2-base"], 2, "HF_HUB_OFFLINE is set"),
        (["contamination", "--train", "nowhere.txt", "--tasks", "t"], 5, "no file matches"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    begun = {"model": "other", "tasks": "gsm8k"}
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/run.json").write_text(json.dumps(begun))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", ["qwen2kit", "eval", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr()
    assert (left.value.code, shown.out) == (code, ""), shown.err
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_help_names_the_commands() -> None:
    done = run_cli("eval", "--help")
    for name in ("--suite", "--resume", "diff", "report", "fetch", "contamination"):
        assert name in done.stdout
