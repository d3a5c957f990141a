"""The GSM8K parsers, beside lm-eval's own filters and metric on the same texts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters.extraction import RegexFilter
from lm_eval.tasks._yaml_loader import load_yaml

from qwen2kit_evals.suites.tasks import gsm8k

CONFIG: dict[str, Any] = load_yaml(Path(lm_eval.tasks.__file__).parent / "gsm8k/gsm8k.yaml")
PIECES = ["72", "1,000", "$1,000", "-5", "3.5", "$", ".", ",", " ", "#### ", "Answer", "00", "12."]


def lm_eval_says(name: str, text: str, gold: str) -> bool:
    entry = next(item for item in CONFIG["filter_list"] if item["name"] == name)
    options = {k: v for k, v in entry["filter"][0].items() if k != "function"}
    ((found,),) = RegexFilter(**options).apply([[text]], [{}])
    how = {
        key: CONFIG["metric_list"][0][key]
        for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")
    }
    return bool(exact_match_fn(predictions=[found], references=[gold], **how)["exact_match"])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.sampled_from(["72", "1,000", "-5"]),
)
def test_strict_and_flexible_are_lm_evals(text: str, number: str) -> None:
    gold = f"Some steps <<1+1=2>>.\n#### {number}"
    assert gsm8k.strict_match(text, gold) == lm_eval_says("strict-match", text, gold)
    assert gsm8k.flexible_match(text, gold) == lm_eval_says("flexible-extract", text, gold)


@pytest.mark.parametrize(
    ("text", "number", "strict", "flexible", "qwen"),
    [
        ("so #### 72", "72", True, True, True),
        ("the answer is 72.", "72", False, True, True),
        ("it costs $1,000", "1000", False, True, False),  # Qwen's script reads 000
        ("it costs $1,000", "0", False, False, True),
        ("the change is -5", "5", False, False, True),
        ("the change is -5", "-5", False, True, False),
        ("that makes 3.5", "5", False, False, True),
        ("agent 007", "7", False, False, False),  # eval("007") is no Python
        ("no number", "7", False, False, False),
    ],
)
def test_where_the_parsers_disagree(
    text: str, number: str, strict: bool, flexible: bool, qwen: bool
) -> None:
    scores = gsm8k.process_results({"answer": f"#### {number}"}, [text])
    assert scores["strict_match"] == strict
    assert scores["flexible_match"] == flexible
    assert scores["qwen_last_number"] == qwen


def test_math_verify_is_there_only_where_it_is_installed() -> None:
    scores = gsm8k.process_results({"answer": "#### 1,000"}, ["it costs $1,000"])
    if importlib.util.find_spec("math_verify") is None:
        assert "math_verify" not in scores
    else:
        assert scores["math_verify"] == 1
