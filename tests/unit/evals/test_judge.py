"""Judged answers against a fake judge on loopback: what is sent, read, averaged, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.errors import BackendError, ConfigError, DataError
from qwen2kit_evals.judge.client import JudgeServer, key_from_environment
from qwen2kit_evals.judge.prompts import comparison, grading, read_grade, read_verdict
from qwen2kit_evals.judge.questions import OpenQuestion, read_answers, read_questions
from qwen2kit_evals.judge.run import answer_questions, judge_answers, sample_rows, summary
from qwen2kit_evals.request_log import RequestLog
from tests.fake_judge import fake_judge
from tests.unit.evals.reference_lm import load_reference

QUESTIONS = (
    OpenQuestion(name="1", category="math", turns=("2+2?", "why?"), reference=("4",)),
    OpenQuestion(name="2", category="write", turns=("a poem",)),
    OpenQuestion(name="3", category="math", turns=("3+3?",)),
)
ANSWERS = {"1": ["four", "sums"], "2": ["roses"], "3": ["seven"]}
BASELINE = {"1": ["4", "because"], "2": ["violets"], "3": ["6"]}


def server(url: str, **changes: Any) -> JudgeServer:
    return JudgeServer(url=url, model="big", **({"pause": 0.001} | changes))


def test_grades_are_asked_for_read_and_averaged() -> None:
    def reply(body: dict[str, Any]) -> str:
        shown = body["messages"][-1]["content"]
        if "roses" in shown:
            return "No verdict."
        return "Weak. [[2]] no: Grade: [[8]]" if "four" in shown else "Wrong.\nGrade: [[ 3 ]]"

    with fake_judge(reply) as judge, RequestLog() as log:
        found = judge_answers(server(judge.url, key="k"), QUESTIONS, ANSWERS, log=log)
    assert [(j.name, j.turn, j.score) for j in found] == [
        ("1", 1, 8.0), ("1", 2, 8.0), ("2", 1, None), ("3", 1, 3.0),
    ]  # fmt: skip
    path, headers, body = judge.requests[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer k")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0, 1024)
    rows = {(row["kind"], row["of"]): row for row in summary(found)}
    assert rows["all", ""]["value"] == pytest.approx((8 + 3) / 2)
    assert rows["all", ""]["stderr"] == pytest.approx(np.std([8, 3], ddof=1) / 2**0.5)
    assert rows["all", ""]["unreadable"] == 1
    assert rows["category", "write"]["value"] is None
    assert rows["turn", "2"]["value"] == 8
    assert "consistent" not in rows["all", ""]


def test_comparisons_are_made_in_both_orders() -> None:
    """A judge that always prefers the first gives 50 %; one that knows gives 100 %."""

    def biased(body: dict[str, Any]) -> str:
        return "Verdict: [[A]]"

    def knowing(body: dict[str, Any]) -> str:
        first = body["messages"][-1]["content"].split("=== Conversation with assistant B")[0]
        return "Verdict: [[A]]" if any(a in first for a in ("four", "roses")) else "[[b]]"

    def run(reply: Any) -> dict[str, Any]:
        with fake_judge(reply) as judge, RequestLog() as log:
            found = judge_answers(
                server(judge.url), QUESTIONS[:2], ANSWERS, baseline=BASELINE, log=log
            )  # fmt: skip
        assert len(judge.requests) == 6
        return summary(found)[0]

    always_first = run(biased)
    assert (always_first["value"], always_first["consistent"]) == (0.5, 0.0)
    better = run(knowing)
    assert (better["value"], better["consistent"]) == (1.0, 1.0)


def test_prompts_show_what_they_should() -> None:
    second = grading(QUESTIONS[0], ["four", "sums"])
    assert [message["role"] for message in second] == ["system", "user"]
    shown = second[1]["content"]
    assert shown.index("2+2?") < shown.index("four") < shown.index("why?") < shown.index("sums")
    assert "correct answer" not in shown  # the reference answers the first turn only
    assert (
        "correct answer to the last question, for you alone:\n\n4"
        in (grading(QUESTIONS[0], ["four"])[1]["content"])
    )
    swapped = comparison(QUESTIONS[1], ["roses"], ["violets"], "baseline first")[1]["content"]
    assert swapped.index("assistant A") < swapped.index("violets") < swapped.index("assistant B")
    assert swapped.index("assistant B") < swapped.index("roses")


@pytest.mark.parametrize(
    ("text", "grade"),
    [("Grade: [[7]]", 7), ("[[3]] then [[4.5]]", 4.5), ("[[11]]", None), ("[[0]]", None),
     ("Grade: 7", None), ("", None), ("[[10]]", 10)],
)  # fmt: skip
def test_grades_outside_the_scale_are_unreadable(text: str, grade: float | None) -> None:
    assert read_grade(text) == grade


@pytest.mark.parametrize(
    ("text", "model_first", "baseline_first"),
    [("[[A]]", 1, 0), ("[[B]]", 0, 1), ("[[Tie]]", 0.5, 0.5), ("A", None, None),
     ("not [[A]] but [[B]]", 0, 1)],
)  # fmt: skip
def test_verdicts_know_who_was_shown_first(
    text: str, model_first: float | None, baseline_first: float | None
) -> None:
    assert read_verdict(text, "model first") == model_first
    assert read_verdict(text, "baseline first") == baseline_first


def test_an_interrupted_judge_is_asked_the_rest_only(tmp_path: Path) -> None:
    asked = iter(range(99))

    def failing(body: dict[str, Any]) -> Any:
        return "Grade: [[5]]" if next(asked) < 2 else (400, {"error": {"message": "no credit"}})

    path = tmp_path / "requests.jsonl"
    with (
        fake_judge(failing) as judge,
        RequestLog(path) as log,
        pytest.raises(BackendError, match="refuses: 400 no credit"),
    ):
        judge_answers(server(judge.url), QUESTIONS, ANSWERS, log=log, workers=1)
    with fake_judge(lambda body: "Grade: [[9]]") as judge, RequestLog(path) as log:
        found = judge_answers(server(judge.url), QUESTIONS, ANSWERS, log=log, workers=1)
    assert sorted(j.score or 0 for j in found) == [5, 5, 9, 9]
    assert len(judge.requests) == 2


def test_a_busy_judge_is_asked_again() -> None:
    replies: list[Any] = [
        (429, {"error": "slow down"}, {"Retry-After": "0.001"}),
        (503, {"error": "starting"}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        "Grade: [[6]]",
    ]
    with fake_judge(lambda body: replies.pop(0)) as judge:
        assert server(judge.url).ask([{"role": "user", "content": "x"}]) == "Grade: [[6]]"
    assert len(judge.requests) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": {"message": "bad key"}}), "401 bad key; check QWEN2KIT_JUDGE_KEY"),
        ((404, {"error": "no model big"}), "refuses: 404 no model big"),
        ((200, {"choices": []}), "does not answer like OpenAI's"),
        ((500, []), "500 Internal Server Error; gave up after 3 attempts"),
        ((302, {}, {"Location": "http://127.0.0.1:9/stolen"}), "refuses: 302"),
    ],
)  # fmt: skip
def test_failures_are_one_line_without_the_key(reply: Any, message: str) -> None:
    with fake_judge(lambda body: reply) as judge, pytest.raises(BackendError) as error:
        server(judge.url, retries=2, key="s3cret").ask([{"role": "user", "content": "x"}])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "s3cret" not in str(error.value) + repr(server(judge.url, key="s3cret"))


def test_nobody_at_the_address() -> None:
    with pytest.raises(BackendError, match=r"out of reach.*gave up after 2 attempts"):
        server("http://127.0.0.1:9", retries=1).ask([{"role": "user", "content": "x"}])
    with pytest.raises(ConfigError, match="--judge-url must begin with http"):
        server("localhost:8000")
    with pytest.raises(ConfigError, match="--judge-model"):
        JudgeServer(url="http://x", model="")


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2KIT_JUDGE_KEY", "k")
    assert key_from_environment() == "k"
    monkeypatch.delenv("QWEN2KIT_JUDGE_KEY")
    assert key_from_environment() is None


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def test_published_question_files_are_read(tmp_path: Path) -> None:
    mt_bench = {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["r"]}
    arena_hard = {"uid": "u1", "cluster": "code", "turns": [{"content": "c"}]}
    align_bench = {"question_id": 9, "category": "推理", "question": "几?", "reference": "三"}
    found = read_questions(write(tmp_path / "q.jsonl", mt_bench, arena_hard, align_bench))
    assert found == (
        OpenQuestion(name="81", category="writing", turns=("a", "b"), reference=("r",)),
        OpenQuestion(name="u1", category="code", turns=("c",)),
        OpenQuestion(name="9", category="推理", turns=("几?",), reference=("三",)),
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no question"), ([{"id": 1, "turns": []}], "line 1: no question"),
        ([{"id": 1, "prompt": "x"}, {"id": 1, "prompt": "y"}], "two lines with one id"),
        ([{"turns": ["x"]}], "line 1: no question: 'id'"), ([["x"]], "line 1 is not a JSON object"),
    ],
)  # fmt: skip
def test_bad_question_files_name_their_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "q.jsonl", *rows))


def test_a_model_answers_turn_after_turn(tiny: Path, tmp_path: Path) -> None:
    loaded = load_reference(tiny)
    gen_kwargs = {"until": [], "max_gen_toks": 4, "do_sample": False}
    with RequestLog() as log:
        answers = answer_questions(loaded, QUESTIONS, gen_kwargs, log=log, batch_size=2)
        assert log.computed == 4
    assert [len(answers[question.name]) for question in QUESTIONS] == [2, 1, 1]
    said = answers["1"][0]
    history = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "why?"},
    ]
    prompt = loaded.tokenizer.render_chat(history, add_generation_prompt=True)
    again = loaded.generate(
        [loaded.tokenizer.encode(prompt)], loaded.sampling(temperature=0.0, max_new_tokens=4)
    )
    expected = loaded.tokenizer.decode([event.token for event in again], skip_special=True)
    assert answers["1"][1] == expected.strip()

    samples = write(tmp_path / "samples.jsonl", *sample_rows(QUESTIONS, answers, []))
    assert read_answers(samples) == {name: tuple(texts) for name, texts in answers.items()}
    with RequestLog() as log, pytest.raises(DataError, match="no answer to question 1, turn 2"):
        judge_answers(
            server("http://127.0.0.1:9"), QUESTIONS, ANSWERS, baseline={"1": ["x"]}, log=log
        )  # fmt: skip
