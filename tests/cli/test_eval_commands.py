"""``qwen2kit eval code``, ``needle``, ``perplexity`` and ``judge``, on a tiny model.

Run in this process (but for one refusal): importing the frameworks anew for each would take most of
the time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.backend.registry import installed
from qwen2kit.cli.app import main
from qwen2kit.cli.eval_model import lengths_of, numbers_of
from qwen2kit.errors import ConfigError
from tests.fake_judge import fake_judge
from tests.run_cli import run_cli
from tests.tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("lm_eval")

PROBLEMS = [
    {"name": "any", "language": "py", "prompt": "x = 1\n#", "tests": "assert x == 1",
     "stop_tokens": ["\n"]},
    {"name": "none", "language": "py", "prompt": "x = 2\n#", "tests": "assert x == 1",
     "stop_tokens": ["\n"]},
]  # fmt: skip
CODE_TASK = """
task: tiny_code
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
unsafe_code: true
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{tests}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: !function tiny_metric.passes, aggregation: mean, higher_is_better: true}]
filter_list: [{name: whole, filter: [{function: custom, filter_fn: !function tiny_metric.whole}]}]
metadata: {version: 1}
"""
CODE_METRIC = """
import evaluate
metric = evaluate.load("code_eval")
def passes(references, predictions):
    return metric.compute(references=references, predictions=predictions, k=[1])[0]["pass@1"]
def whole(responses, docs):
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(responses, docs)]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not installed():
        pytest.skip("no backend installed")
    home = tmp_path_factory.mktemp("commands")
    write_tiny_checkpoint(home / "model", max_position_embeddings=2048)
    (home / "essay.txt").write_text(
        "The cat sat on the mat. Did the dog run? It ran and ran! " * 60
    )
    (home / "problems.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS)))
    return home


class Command:
    """The command line in this process."""

    def __init__(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.home = home
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.stderr = ""

    def __call__(self, *arguments: object) -> str:
        """Standard output of ``qwen2kit eval ARGUMENTS``."""
        command = ["qwen2kit", "eval", *map(str, arguments)]
        self._monkeypatch.setattr(sys, "argv", command)
        self._monkeypatch.chdir(self.home)
        try:
            main()
        finally:
            out, self.stderr = self._capsys.readouterr()
        return out

    def json(self, *arguments: object) -> Any:
        """Its JSON document, which results.json repeats."""
        document = json.loads(self(*arguments, "--json"))
        assert json.loads((self.home / document["output"] / "results.json").read_text()) == document
        return document

    def samples(self, document: Any) -> list[Any]:
        """The rows of samples.jsonl."""
        lines = (self.home / document["output"] / "samples.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def refusal(self, *arguments: object) -> tuple[int, str]:
        """Exit code and the one line on standard error."""
        with pytest.raises(SystemExit) as leave:
            self(*arguments)
        line = self.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert "Traceback" not in self.stderr
        return int(leave.value.code or 0), line


@pytest.fixture
def command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    monkeypatch.setenv("COLUMNS", "200")
    return Command(home, monkeypatch, capsys)


def test_code_needs_consent_and_says_what_held_the_programs(command: Command) -> None:
    options = ["code", "model", "--problems", "problems.jsonl", "--max-tokens", 4]
    code, line = command.refusal(*options)
    assert code == 2
    assert "add --allow-code-execution" in line
    assert command.refusal(*options, "--weak-sandbox")[0] == 2
    found = command.json(*options, "--allow-code-execution", "--weak-sandbox", "--output", "code")
    assert found["scores"] == [
        {"tests": "base", "metric": "pass@1", "value": 0.5, "stderr": 0.5, "problems": 2}
    ]
    assert found["code_execution"]["programs"] == {"failed": 1, "passed": 1}
    assert found["code_execution"]["limits"]["seconds"] == 3.0
    assert "programs ran in a sandbox (" in command.stderr
    rows = command.samples(found)
    assert [row["verdict"]["base"] for row in rows] == ["passed", "failed"]
    code, line = command.refusal(*options, "--allow-code-execution", "--weak-sandbox",
                                 "--output", "code")  # fmt: skip
    assert (code, "--output code already exists" in line) == (2, True)


def test_lm_eval_tasks_with_programs_need_consent_too(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen2kit_evals import tasks as selecting

    manager = selecting.TaskManager  # without lm-eval's own tasks, which take long to read
    monkeypatch.setattr(
        selecting, "TaskManager", lambda **given: manager(**given | {"include_defaults": False})
    )
    tasks = command.home / "tasks"
    tasks.mkdir()
    (tasks / "tiny_code.yaml").write_text(
        CODE_TASK % json.dumps(str(command.home / "problems.jsonl"))
    )
    (tasks / "tiny_metric.py").write_text(CODE_METRIC)
    options = ["model", "--tasks", "tiny_code", "--include-path", "tasks", "--output", "lm-eval"]
    code, line = command.refusal(*options)
    assert code == 2
    assert "tiny_code runs programs that the model wrote" in line
    assert "--allow-code-execution" in line
    document = command.json(*options, "--allow-code-execution", "--weak-sandbox")
    assert [row["value"] for row in document["results"]] == [0.5]
    execution = document["provenance"]["evaluation"]["code_execution"]
    assert execution["programs"] == {"failed": 1, "passed": 1}
    assert any("programs ran in a sandbox" in notice for notice in document["notices"])
    lines = (command.home / "lm-eval/samples_tiny_code.jsonl").read_text().splitlines()
    ends = [[end["verdict"] for end in json.loads(line)["programs"]] for line in lines]
    assert ends == [["passed"], ["failed"]]


def test_needle_writes_its_grid_and_a_picture(command: Command) -> None:
    document = command.json(
        "needle", "model", "--text", "essay.txt", "--lengths", "400,1k", "--depths", "0,100",
        "--dtype", "float32", "--output", "needle",
    )  # fmt: skip
    assert [(cell["length"], cell["depth"]) for cell in document["cells"]] == [
        (400, 0.0), (400, 100.0), (1024, 0.0), (1024, 100.0),
    ]  # fmt: skip
    assert document["accuracy"] == 0  # the model's weights are random
    rows = command.samples(document)
    assert all(len(row["expected"]) == 7 and not row["correct"] for row in rows)
    picture = command.home / document["output"] / document["heat_map"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Needles found: 0.0%" in command.stderr


def test_perplexity_by_length(command: Command) -> None:
    document = command.json(
        "perplexity", "model", "--text", "essay.txt", "--lengths", "64,256", "--blocks", "4",
        "--dtype", "float32", "--output", "perplexity",
    )  # fmt: skip
    assert [(point["length"], point["tokens"]) for point in document["lengths"]] == [
        (64, 128), (256, 128),
    ]  # fmt: skip
    assert command.samples(document) == document["lengths"]
    assert "Perplexity by context length" in command.stderr


def test_judge_grades_then_compares_and_goes_on_after_a_failure(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [{"id": n, "category": "c", "turns": ["what is the answer?"]} for n in (1, 2)]
    (command.home / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    monkeypatch.setenv("QWEN2KIT_JUDGE_KEY", "s3cret")
    replies: list[Any] = ["Grade: [[4]]", (400, {"error": "no credit"}), "Grade: [[6]]"]
    options = ["judge", "model", "--questions", "q.jsonl", "--judge-model", "big",
               "--judge-workers", 1, "--max-tokens", 4]  # fmt: skip
    with fake_judge(lambda body: replies.pop(0)) as judge:
        run = [*options, "--judge-url", judge.url, "--output", "graded"]
        assert command.refusal(*run) == (
            8,
            f"error: the judge at {judge.url} refuses: 400 no credit",
        )
        graded = command.json(*run)
    assert graded["scores"][0]["value"] == 5
    assert judge.requests[0][1]["Authorization"] == "Bearer s3cret"
    files = (command.home / "graded").iterdir()
    assert not any("s3cret" in file.read_text() for file in files)
    with fake_judge(lambda body: "Verdict: [[A]]") as judge:
        compared = command.json(
            *options, "--judge-url", judge.url, "--baseline", "graded/samples.jsonl",
            "--output", "compared",
        )  # fmt: skip
    assert (compared["metric"], compared["scores"][0]["value"]) == ("win rate", 0.5)
    assert compared["scores"][0]["consistent"] == 0
    assert len(judge.requests) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["needle", "model", "--text", "nowhere"], "does not exist"),
        (["needle", "model", "--text", "essay.txt", "--lengths", "1m"], "token counts like 1k"),
        (["needle", "model", "--text", "essay.txt", "--depths", "a"], "--depths must be numbers"),
        (["needle", "model", "--text", "essay.txt", "--lengths", "4k"], "exceeds what this model"),
        (["perplexity", "model", "--text", "essay.txt", "--lengths", "0"], "token counts"),
        (["perplexity", "model", "--text", "essay.txt", "--lengths", "8k"], "exceeds the model"),
        (["code", "model", "--problems", "no.jsonl", "--allow-code-execution", "--weak-sandbox"],
         "no such file"),
        (["code", "model", "--problems", "problems.jsonl", "--allow-code-execution",
          "--weak-sandbox", "--k", "5"], "--k needs numbers"),
        (["judge", "model", "--questions", "q", "--judge-url", "x", "--judge-model", "m"],
         "--judge-url must begin with http"),
        (["judge", "model", "--questions", "q", "--judge-url", "http://x"], "--judge-model"),
    ],
    ids=range(10),
)  # fmt: skip
def test_bad_options_are_one_line(command: Command, arguments: list[str], message: str) -> None:
    code, line = command.refusal(*arguments)
    assert code in (2, 5)
    assert message in line


def test_missing_extra_names_its_install_command(home: Path) -> None:
    options = ["needle", "model", "--text", "essay.txt"]
    done = run_cli("eval", *options, cwd=home, hide="lm_eval")
    assert (done.returncode, done.stdout) == (8, "")
    assert "pip install 'qwen2kit[eval]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_numbers_as_people_write_them() -> None:
    assert lengths_of("1k, 2K,300") == [1024, 2048, 300]
    assert numbers_of("0,12.5", "--depths") == [0.0, 12.5]
    for text in ("", "1.5k", "-4", "k", "1,,2"):
        with pytest.raises(ConfigError, match="--lengths"):
            lengths_of(text)
