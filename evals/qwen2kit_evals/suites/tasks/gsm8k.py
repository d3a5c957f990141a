"""Four readings of one GSM8K answer; they disagree on "$1,000", "-5" and "3.5"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

_GOLD = re.compile(r"#### (-?[\d.,]+)")
_FLEXIBLE = re.compile(r"(-?[$\d.,]{2,})|(-?\d+)")


def process_results(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Per parser, whether it finds the right answer; `math_verify` only where it is installed.

    Args:
        doc: a row with ``answer``, ending in "#### <number>".
        results: the one generation.
    """
    (text,), gold = results, doc["answer"]
    scores = {
        "strict_match": strict_match(text, gold),
        "flexible_match": flexible_match(text, gold),
        "qwen_last_number": qwen_last_number(text, gold),
    }
    if find_spec("math_verify") is not None:
        scores["math_verify"] = math_verify(text, gold)
    return {name: float(score) for name, score in scores.items()}


def strict_match(text: str, gold: str) -> bool:
    """The number after the first "####", as lm-eval's ``strict-match``."""
    found = _GOLD.search(text)
    return found is not None and _same(found[1], gold)


def flexible_match(text: str, gold: str) -> bool:
    """The last thing that looks like a number, as lm-eval's ``flexible-extract``."""
    found = _FLEXIBLE.findall(text)
    return bool(found) and _same("".join(found[-1]).strip(), gold)


def qwen_last_number(text: str, gold: str) -> bool:
    """The last run of digits, as Qwen's script (eval/evaluate_gsm8k.py) reads it.

    So "$1,000" is 0, "-5" is 5 and "3.5" is 5; a number with leading zeros is no answer.
    """
    digits = re.findall(r"\d+", text)
    if not digits or (digits[-1].startswith("0") and int(digits[-1])):
        return False
    return int(digits[-1]) == float(_number(gold).replace(",", ""))


def math_verify(text: str, gold: str) -> bool:
    """Whether ``math_verify`` (an optional package) finds an equal value."""
    from math_verify import parse, verify  # type: ignore[import-not-found]

    return bool(verify(parse(_number(gold).replace(",", "")), parse(text)))


def _number(gold: str) -> str:
    found = _GOLD.search(gold)
    if found is None:
        raise ValueError(f"no '#### <number>' in a reference answer: {gold[-40:]!r}")
    return found[1]


def _same(found: str, gold: str) -> bool:
    plain = (re.sub(r"\.$", "", re.sub(r"[,$]", "", text)) for text in (found, _number(gold)))
    return len(set(plain)) == 1
