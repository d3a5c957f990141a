"""pass@k, the stand-in for the Hub's metric, lm-eval's code tasks, and problem files."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.errors import ConfigError, DataError
from qwen2kit_evals.code_eval import CodeEval, code_execution, joined, pass_at_k
from qwen2kit_evals.code_problems import CodeProblem, read_problems
from qwen2kit_evals.code_run import CodeOptions, run_problems, scores
from qwen2kit_evals.request_log import RequestLog
from qwen2kit_evals.run import run_tasks
from qwen2kit_evals.sandbox.limits import Limits
from qwen2kit_evals.sandbox.probe import strongest_sandbox
from qwen2kit_evals.tasks import TaskSelection, select_tasks
from tests.unit.evals.reference_lm import load_reference

lm_eval_model = pytest.importorskip("lm_eval.api.model")
lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
TaskManager = lm_eval_tasks.TaskManager


@pytest.fixture(scope="module")
def code() -> CodeEval:
    return CodeEval(strongest_sandbox(Limits(seconds=5.0), weak=True))


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 2), (8, 7), (6, 6), (7, 0)])
def test_pass_at_k_is_the_share_of_drawings_that_hold_a_pass(n: int, c: int) -> None:
    for k in range(1, n + 1):
        drawn = [any(index < c for index in chosen) for chosen in combinations(range(n), k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(drawn) / len(drawn), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(200, 3, 100), (200, 57, 10), (64, 1, 64), (100, 99, 1)])
def test_pass_at_k_equals_the_published_stable_product(n: int, c: int, k: int) -> None:
    """Chen et al. 2021, figure 3: 1 - prod(1 - k / i) over i = n - c + 1 ... n."""
    product = 1.0 if n - c < k else 1 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(product, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, 1, 0), (3, 1, 4), (3, -1, 1)])
def test_undefined_estimates_are_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="undefined"):
        pass_at_k(n, c, k)


def test_the_metrics_documented_example(code: CodeEval) -> None:
    """The example of the Hub metric's own documentation."""
    programs = [["def add(a,b): return a*b", "def add(a, b): return a+b"]]
    found, results = code.compute(["assert add(2,3)==5"], programs, k=[1, 2, 10])
    assert found == {"pass@1": 0.5, "pass@2": 1.0}
    assert [(number, result["passed"]) for number, result in results[0]] == [(0, False), (1, True)]
    assert results[0][0][1]["result"] == "failed: AssertionError: "


def test_k_is_left_out_where_a_problem_has_too_few_programs(code: CodeEval) -> None:
    found, _ = code.compute(["assert f()", "assert f()"], [["f = int"] * 2, ["f = bool"]], k=[1, 2])
    assert found == {"pass@1": 0.0}


def test_equal_programs_run_once_and_order_is_kept(code: CodeEval) -> None:
    before = len(code.outcomes())
    unlike = "import random\nassert random.SystemRandom().random() < 0.5"
    ends = code.run([unlike, "raise KeyError('a')", unlike, unlike])
    assert len(code.outcomes()) == before + 2
    assert len({ends[0], ends[2], ends[3]}) == 1
    assert ends[1].detail == "KeyError: 'a'"
    assert sum(code.document()["programs"].values()) == before + 2


class Scripted(lm_eval_model.LM):  # type: ignore[misc,name-defined]
    """Answers every prompt as a function of the document says."""

    def __init__(self, reply: Any) -> None:
        super().__init__()
        self._reply = reply

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [self._reply(request.doc, request.idx) for request in requests]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise AssertionError("code tasks generate")

    loglikelihood_rolling = loglikelihood


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """lm-eval's code tasks alone: reading all of its tasks takes long."""
    root = Path(lm_eval_tasks.__file__).parent
    folders = [str(root / name) for name in ("humaneval", "mbpp")]
    return TaskManager(include_path=folders, include_defaults=False)


@pytest.fixture(scope="module")
def code_tasks(datasets_dir: Path, code: CodeEval, manager: TaskManager) -> TaskSelection:
    with code_execution(code):
        names = ["humaneval", "humaneval_instruct", "mbpp", "mbpp_instruct", "humaneval_64"]
        return select_tasks(names, datasets=datasets_dir, manager=manager)


def solution(doc: dict[str, Any], index: int) -> str:
    """The data's own solution, dressed as the tasks expect; every fourth sample is wrong."""
    if index % 4 == 3:
        return "    return 'wrong'\n"
    if "canonical_solution" in doc:
        return str(doc["canonical_solution"]) + "```"
    return f"\n{doc['code']}\n```"


def test_lm_evals_code_tasks_pass_with_the_datas_own_solutions(
    code: CodeEval, code_tasks: TaskSelection
) -> None:
    def reply(doc: dict[str, Any], index: int) -> str:
        return solution(doc, index).removesuffix("```")

    def metrics(model: Any, names: tuple[str, ...]) -> dict[str, Any]:
        chosen = [o for o in code_tasks.objects if o.task_name in names]
        selection = TaskSelection(
            names=names, objects=tuple(chosen), manager=code_tasks.manager,
            data=code_tasks.data, num_fewshot=None, notices=(),
        )  # fmt: skip
        with code_execution(code):
            return dict(run_tasks(model, selection, limit=3)["results"])

    plain = metrics(Scripted(reply), ("humaneval", "mbpp"))
    assert plain["humaneval"]["pass@1,create_test"] == 1.0
    assert plain["mbpp"]["pass_at_1,none"] == 1.0
    fenced = metrics(Scripted(solution), ("humaneval_instruct", "mbpp_instruct"))
    assert fenced["humaneval_instruct"]["pass@1,create_test"] == 1.0
    assert fenced["mbpp_instruct"]["pass_at_1,extract_code"] == 1.0
    wrong = metrics(Scripted(lambda doc, index: "    pass\n```"), code_tasks.names[:4])
    assert {v for row in wrong.values() for k, v in row.items() if k.startswith("pass")} == {0.0}


def test_lm_evals_own_repeats_give_the_estimator_of_the_paper(
    code: CodeEval, code_tasks: TaskSelection
) -> None:
    """humaneval_64 of lm-eval: its prompts, repeats, filter and metric; a quarter is wrong."""
    calls = iter(range(10_000))

    def reply(doc: dict[str, Any], index: int) -> str:
        return solution(doc, next(calls)).removesuffix("```")

    [task] = [o for o in code_tasks.objects if o.task_name == "humaneval_64"]
    selection = TaskSelection(
        names=("humaneval_64",), objects=(task,), manager=code_tasks.manager,
        data=code_tasks.data, num_fewshot=None, notices=(),
    )  # fmt: skip
    with code_execution(code):
        found = run_tasks(Scripted(reply), selection, limit=1)["results"]["humaneval_64"]
    for k in (2, 8, 16):
        stable = 1 - np.prod(1.0 - k / np.arange(64 - 48 + 1, 65))
        assert found[f"pass@{k},create_test"] == pytest.approx(stable, abs=1e-12)


def test_without_consent_nothing_runs(
    datasets_dir: Path, code: CodeEval, manager: TaskManager
) -> None:
    with pytest.raises(ConfigError, match=r"programs that the model wrote.*--allow-code-execution"):
        select_tasks(["humaneval"], datasets=datasets_dir, manager=manager)
    with code_execution(code):
        select_tasks(["humaneval"], datasets=datasets_dir, manager=manager)
    task_module = sys.modules["lm_eval.tasks.humaneval.utils"]
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        task_module.pass_at_k(["assert True"], [["x = 1"]], k=1)


def test_other_metrics_still_come_from_evaluate(
    code: CodeEval, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr(evaluate, "load", lambda path, *rest: ("hub", path, rest))
    with code_execution(code):
        assert evaluate.load("bleu", "x") == ("hub", "bleu", ("x",))
        assert evaluate.load("code_eval") != ("hub", "code_eval", ())
    assert evaluate.load("code_eval") == ("hub", "code_eval", ())


MULTIPL_E = {
    "name": "he_0_add", "language": "py", "prompt": "def add(a: int, b: int) -> int:\n",
    "tests": "def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)",
    "stop_tokens": ["\ndef", "\nclass"],
}  # fmt: skip
EVAL_PLUS = {
    "task_id": "HumanEval/1", "prompt": "def half(x):\n", "entry_point": "half",
    "canonical_solution": "    return x / 2\n", "base_input": [[1], [2.0]],
    "plus_input": [[-3], [1e300]], "atol": 1e-6,
}  # fmt: skip
MUTATING = {
    "task_id": "m", "prompt": "def top(xs):\n", "entry_point": "top",
    "canonical_solution": "    return (max(xs), sorted(xs), {'n': float('nan')})\n",
    "base_input": [[[3, 1, 2]]],
}  # fmt: skip


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def ends(code: CodeEval, problem: CodeProblem, completion: str) -> dict[str, bool]:
    programs = {
        kind: joined([problem.prompt + completion], test)[0] for kind, test in problem.tests.items()
    }
    return dict(zip(programs, [end.passed for end in code.run(programs.values())], strict=True))


def test_published_formats_are_read_as_they_are(tmp_path: Path, code: CodeEval) -> None:
    add, half, top = read_problems(write(tmp_path / "p.jsonl", MULTIPL_E, EVAL_PLUS, MUTATING))
    assert add.stop == ("\ndef", "\nclass")
    assert ends(code, add, "    return a + b\n") == {"base": True}
    assert ends(code, add, "    return a - b\n") == {"base": False}
    assert ends(code, half, half.solution) == {"base": True, "plus": True}
    assert ends(code, half, "    return x * 0.5000000001\n") == {"base": True, "plus": True}
    assert ends(code, half, "    return abs(x) / 2\n") == {"base": True, "plus": False}
    assert ends(code, half, "    return None\n") == {"base": False, "plus": False}
    mutate = "    xs.sort()\n    return [xs[-1], xs, {'n': float('nan')}]\n"
    assert ends(code, top, mutate) == {"base": True}
    assert ends(code, top, "    return (3, [1, 2, 3], {'n': 0.0})\n") == {"base": False}


def test_human_evals_own_solutions_pass(datasets_dir: Path, tmp_path: Path, code: CodeEval) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    [file] = (datasets_dir / "openai/openai_humaneval").rglob("*.parquet")
    rows = parquet.read_table(file).to_pylist()[::20]
    problems = read_problems(write(tmp_path / "humaneval.jsonl", *rows))
    assert len(problems) == 9
    assert all(ends(code, problem, problem.solution)["base"] for problem in problems)
    assert not any(ends(code, problem, "    return ...\n")["base"] for problem in problems)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no problem"),
        ([MULTIPL_E, MULTIPL_E], "two problems of one name"),
        ([MULTIPL_E | {"language": "rb"}], "line 1: its language is rb; only Python"),
        ([MULTIPL_E, {"name": "x", "tests": ""}], "line 2: lacks 'prompt'"),
        (["{"], "line 1: Expecting property name"),
        (["[1]"], "line 1: list|line 1: 'list'"),
    ],
)
def test_bad_files_name_their_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_problems(write(tmp_path / "p.jsonl", *rows))
    with pytest.raises(DataError, match="no such file"):
        read_problems(tmp_path / "absent.jsonl")


def test_a_run_completes_counts_and_resumes(tiny: Path, tmp_path: Path, code: CodeEval) -> None:
    loaded = load_reference(tiny)
    problems = read_problems(write(tmp_path / "p.jsonl", MULTIPL_E, EVAL_PLUS))
    options = CodeOptions(samples=3, k=(1, 2), temperature=1.0, max_tokens=6, seed=4)

    def run() -> tuple[list[dict[str, Any]], int]:
        with RequestLog(tmp_path / "requests.jsonl", "m") as log:
            rows = run_problems(loaded, problems, code, options, log=log, batch_size=2)
            return rows, log.computed

    rows, computed = run()
    assert computed == 6
    assert [row["sample"] for row in rows if row["problem"] == "he_0_add"] == [0, 1, 2]
    assert len({row["completion"] for row in rows}) > 2
    log = tmp_path / "requests.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    assert run() == (rows, 3)
    found = scores(rows, options.k)
    assert [(s["tests"], s["metric"], s["problems"]) for s in found] == [
        ("base", "pass@1", 2), ("base", "pass@2", 2), ("plus", "pass@1", 1), ("plus", "pass@2", 1),
    ]  # fmt: skip


def test_scores_are_means_over_problems() -> None:
    rows = [
        {"problem": name, "passed": {"base": passed}}
        for name, passes in (("a", (1, 0, 0)), ("b", (1, 1, 1)), ("c", (0, 0, 0)))
        for passed in map(bool, passes)
    ]
    one, two = scores(rows, (1, 2))
    assert one["value"] == pytest.approx((1 / 3 + 1) / 3)
    assert two["value"] == pytest.approx((2 / 3 + 1) / 3)
    assert one["stderr"] == pytest.approx(np.std([1 / 3, 1, 0], ddof=1) / 3**0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (2,)}, "--k needs numbers from 1 to --samples"),
        ({"k": ()}, "--k needs"),
        ({"k": (0,)}, "--k needs"),
        ({"samples": 2}, "--temperature above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodeOptions(**options)
