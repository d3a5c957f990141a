"""Tools from functions: schemas beside those of transformers, checked calls, bad files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from qwen2kit.chat.tool_functions import load_tools, tool_of
from qwen2kit.errors import ConfigError


def weather(city: str, days: int = 3, unit: Literal["C", "F"] = "C") -> dict[str, Any]:
    """Forecast for a city.

    Nothing of this is told.

    Args:
        city: its name,
            in English
        days: how many
        unit: of the temperature
    """
    return {"city": city, "days": days, "unit": unit}


def test_schema() -> None:
    assert tool_of(weather).schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Forecast for a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "its name, in English"},
                    "days": {"type": "integer", "default": 3, "description": "how many"},
                    "unit": {
                        "type": "string",
                        "enum": ["C", "F"],
                        "default": "C",
                        "description": "of the temperature",
                    },
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }


def plain(text: str, count: int, ratio: float, flag: bool, names: list[str]) -> str:
    """Everything at once.

    Args:
        text: some text
        count: some number
        ratio: some share
        flag: yes or no
        names: some names
    """
    return text


def test_schema_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs = transformers.get_json_schema(plain)
    theirs["function"].pop("return")
    ours = tool_of(plain).schema
    ours["function"]["parameters"].pop("additionalProperties")
    assert ours == theirs


def test_run() -> None:
    tool = tool_of(weather)
    assert json.loads(tool.run({"city": "Köln"})) == {"city": "Köln", "days": 3, "unit": "C"}
    assert json.loads(tool.run({"city": "x", "days": "5"}))["days"] == 5
    assert "Köln" in tool.run({"city": "Köln"})
    assert tool.run({}) == "error: wrong arguments: city: Field required"
    assert "days" in tool.run({"city": "x", "days": "many"})
    assert "more: Extra inputs" in tool.run({"city": "x", "more": 1})


def test_strings_stay_and_errors_are_told() -> None:
    def echo(json: str, schema: str = "s") -> str:
        """Names that a model class would not take."""
        if json == "bad":
            raise RuntimeError("it\nbroke")
        return json + schema

    tool = tool_of(echo)
    assert tool.run({"json": "a", "schema": "b"}) == "ab"
    assert tool.run({"json": "bad"}) == "error: RuntimeError: it\nbroke"


class _Silent(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def _circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (_circle(), "error: ValueError: Circular"),
        ({(1, 2): 3}, "error: TypeError: keys must be"),
        (SystemExit(3), "error: SystemExit: 3"),
        (_Silent(), "error: _Silent"),
        ("half \ud800", "half ?"),
    ],
)
def test_whatever_a_function_does_is_text_for_the_model(outcome: object, told: str) -> None:
    def strange() -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    assert tool_of(strange).run({}).startswith(told)


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from math import sqrt\nfrom os.path import join\n"
        "def _hidden(x: int) -> int:\n    return x\n"
        "def double(x: int) -> int:\n    '''Twice.'''\n    return 2 * _hidden(x)\n"
        "def now() -> str:\n    return 'noon'\n"
    )
    tools = load_tools(path)
    assert [tool.name for tool in tools] == ["double", "now"]
    assert tools[0].run({"x": 4}) == "8"
    assert tools[1].run({}) == "noon"
    assert tools[1].schema["function"]["parameters"]["properties"] == {}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "is not a Python file"),
        ("def f(x): pass", "parameter x has no type hint"),
        ("def f(*x: int): pass", "cannot be given by name"),
        ("def f(x: int, /): pass", "cannot be given by name"),
        ("async def f(x: int): pass", "asynchronous"),
        ("class A: pass\ndef f(x: A): pass", "no JSON"),
        ("def f(x: 'Nothing'): pass", "unknown type"),
        ("def f(:", "SyntaxError"),
        ("raise KeyError('a\\nb')", "does not run: KeyError"),
        ("raise SystemExit(1)", "does not run: SystemExit"),
        ("x = 1", "no public function"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, source: str | None, reason: str) -> None:
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigError, match=reason) as raised:
        load_tools(path)
    assert "\n" not in str(raised.value)
