"""Programming problems in JSONL files: HumanEval, EvalPlus and MultiPL-E (Python) read as they are.

One problem a line. Two ways to say what is right:

- tests: ``tests`` (MultiPL-E), or ``test`` that defines ``check`` and ``entry_point`` (HumanEval);
- examples: ``base_input``, lists of arguments for ``entry_point``, answered as well by
  ``canonical_solution`` (EvalPlus); ``plus_input`` holds further ones and ``atol`` the absolute
  tolerance of floats (default 0; relative 1e-7).

The other fields: ``prompt``, the program's beginning; ``task_id`` or ``name``; ``stop_tokens``,
strings that end it (default: those of HumanEval); ``language``, which must be Python if given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qwen2kit.errors import DataError

HUMAN_EVAL_STOPS: Final = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_PYTHON = {"py", "python"}

_EXAMPLES = """
def _same(want, got, atol):
    import math
    if isinstance(want, float) or isinstance(got, float):
        try:
            return want == got or math.isclose(want, got, rel_tol=1e-7, abs_tol=atol) or (
                math.isnan(want) and math.isnan(got)
            )
        except (TypeError, OverflowError):
            return False
    if isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)):
        return len(want) == len(got) and all(_same(a, b, atol) for a, b in zip(want, got))
    if isinstance(want, dict) and isinstance(got, dict):
        return want.keys() == got.keys() and all(_same(want[k], got[k], atol) for k in want)
    return want == got

def _check(candidate):
    import copy, json
    names = {{"__name__": "reference"}}
    exec({reference!r}, names)
    for arguments in json.loads({inputs!r}):
        want = names[{entry!r}](*copy.deepcopy(arguments))
        got = candidate(*copy.deepcopy(arguments))
        assert _same(want, got, {atol!r}), f"{{arguments!r:.99}}: {{got!r:.99}}, not {{want!r:.99}}"

_check({entry})
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeProblem:
    """A program to complete.

    Attributes:
        name: tells it from the file's others.
        prompt: beginning of the program.
        stop: strings that end the completion.
        tests: code to run below the program, per kind: ``base``, and ``plus`` where the file has
            more examples (these include the base ones).
        solution: a completion that is known to be right; empty if the file has none.
    """

    name: str
    prompt: str
    stop: tuple[str, ...]
    tests: Mapping[str, str]
    solution: str = ""


def read_problems(path: Path) -> tuple[CodeProblem, ...]:
    """The problems of a file.

    Raises:
        DataError: the file is absent or empty, or a line is not a problem in Python.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file of problems")
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            problems.append(_problem(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}, line {number}: {what}") from error
    names = [problem.name for problem in problems]
    if not problems or len(set(names)) < len(names):
        wrong = "holds no problem" if not problems else "has two problems of one name"
        raise DataError(f"{path} {wrong}")
    return tuple(problems)


def _problem(row: Mapping[str, Any]) -> CodeProblem:
    language = row.get("language", "py")
    if language.lower() not in _PYTHON:
        raise ValueError(f"its language is {language}; only Python programs can be run")
    stop = row.get("stop_tokens")
    return CodeProblem(
        name=str(row["task_id"] if "task_id" in row else row["name"]),
        prompt=row["prompt"],
        stop=HUMAN_EVAL_STOPS if stop is None else tuple(stop),
        tests=_tests(row),
        solution=row.get("canonical_solution", ""),
    )


def _tests(row: Mapping[str, Any]) -> dict[str, str]:
    if "base_input" in row:
        base, plus = list(row["base_input"]), list(row.get("plus_input") or [])
        found = {"base": _example_tests(row, base)}
        return found | ({"plus": _example_tests(row, base + plus)} if plus else {})
    if "tests" in row:
        return {"base": row["tests"]}
    return {"base": f"{row['test']}\ncheck({row['entry_point']})"}


def _example_tests(row: Mapping[str, Any], inputs: list[Any]) -> str:
    return _EXAMPLES.format(
        reference=row["prompt"] + row["canonical_solution"],
        inputs=json.dumps(inputs),
        entry=row["entry_point"],
        atol=row.get("atol", 0),
    )
