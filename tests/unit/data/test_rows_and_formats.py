"""Files -> rows -> conversations, and what malformed ones are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.config.data_tree import (
    AlpacaFormat,
    JsonlData,
    MessagesFormat,
    ParquetData,
    PromptResponseFormat,
    RowFormat,
    ShareGPTFormat,
    TextData,
    TextFormat,
)
from qwen2kit.data.formats import to_messages, to_text
from qwen2kit.data.rows import Row, read_rows
from qwen2kit.errors import DataError

USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "yo"}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(**columns: Any) -> Row:
    return Row("f.jsonl", 7, columns)


def test_jsonl_array_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    values = [{"text": f"täxt {i}", "n": i} for i in range(5)]
    one = jsonl(tmp_path / "a.jsonl", values)
    two = tmp_path / "a.json"
    two.write_text("\n  " + json.dumps(values, indent=1), encoding="utf-8")
    three = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(values), three, row_group_size=2)
    for data in (
        JsonlData(paths=(str(one),)),
        JsonlData(paths=(str(two),)),
        ParquetData(paths=(str(three),), format=MessagesFormat()),
    ):
        rows = list(read_rows(data))
        assert [dict(r.value) for r in rows] == values
        assert [r.number for r in rows] == [1, 2, 3, 4, 5]
    only_text = read_rows(ParquetData(paths=(str(three),)))
    assert [dict(r.value) for r in only_text] == [{"text": value["text"]} for value in values]


def test_globs_are_sorted_and_do_not_repeat(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    patterns = (str(tmp_path / "c.jsonl"), str(tmp_path / "*.jsonl"))
    texts = [r.value["text"] for r in read_rows(JsonlData(paths=patterns))]
    assert texts == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", ["one\ntwo\n\n\nthree\n"]),
        ("line", ["one", "two", "", "", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
    ],
)
def test_text_files(split: Any, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\n\n\nthree\n", encoding="utf-8")
    rows = read_rows(TextData(paths=(str(path),), split=split))
    assert [r.value["text"] for r in rows] == expected


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="no file matches"):
        list(read_rows(JsonlData(paths=(str(tmp_path / "*.jsonl"),))))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl, row 2: not valid JSON"):
        list(read_rows(JsonlData(paths=(str(bad),))))
    bad.write_text('{"a": 1}\n[1, 2]\n', encoding="utf-8")
    with pytest.raises(DataError, match="row 2: expected a JSON object, got list"):
        list(read_rows(JsonlData(paths=(str(bad),))))
    bad.write_text('[{"a": 1},', encoding="utf-8")
    with pytest.raises(DataError, match="not valid JSON"):
        list(read_rows(JsonlData(paths=(str(bad),))))
    digits = "9" * 5000
    for text, place in ((f'{{"a": {digits}}}', "row 1"), (f'[{{"a": {digits}}}]', "bad.jsonl")):
        bad.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=f"{place}: holds a number of too many digits"):
            list(read_rows(JsonlData(paths=(str(bad),))))
    bad.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match="nested too deeply"):
        list(read_rows(JsonlData(paths=(str(bad),))))
    bad.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_rows(JsonlData(paths=(str(bad),))))
    parquet = tmp_path / "bad.parquet"
    parquet.write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(DataError, match=r"bad\.parquet is not a readable Parquet"):
        list(read_rows(ParquetData(paths=(str(parquet),))))


@pytest.mark.parametrize(
    ("columns", "format", "expected"),
    [
        ({"messages": [USER, BOT]}, MessagesFormat(), [USER, BOT]),
        ({"c": [USER, BOT]}, MessagesFormat(column="c"), [USER, BOT]),
        (
            {"messages": [USER, BOT | {"tool_calls": None, "weight": 1}]},
            MessagesFormat(),
            [USER, BOT],
        ),
        ({"prompt": "hi", "response": "yo"}, PromptResponseFormat(), [USER, BOT]),
        ({"instruction": "hi", "input": "", "output": "yo"}, AlpacaFormat(), [USER, BOT]),
        ({"instruction": "hi", "output": "yo"}, AlpacaFormat(), [USER, BOT]),
        (
            {"instruction": "add", "input": "1 2", "output": "yo", "system": "S"},
            AlpacaFormat(),
            [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "add\n1 2"},
                BOT,
            ],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "yo"},
                    {"from": "observation", "value": "3"},
                ]
            },
            ShareGPTFormat(),
            [USER, BOT, {"role": "tool", "content": "3"}],
        ),
    ],
)
def test_formats(columns: dict[str, Any], format: RowFormat, expected: list[Any]) -> None:
    assert to_messages(row(**columns), format, None) == expected


def test_system_message_is_added_only_where_there_is_none() -> None:
    plain = to_messages(row(messages=[USER, BOT]), MessagesFormat(), "be brief")
    assert plain[0] == {"role": "system", "content": "be brief"}
    own = [{"role": "system", "content": "mine"}, USER, BOT]
    assert to_messages(row(messages=own), MessagesFormat(), "be brief") == own


@pytest.mark.parametrize(
    ("columns", "format", "part"),
    [
        ({"a": 1}, MessagesFormat(), r"'messages' must be a non-empty list .*columns: a"),
        ({"messages": []}, MessagesFormat(), "non-empty list"),
        ({"messages": ["x"]}, MessagesFormat(), r"messages\[0\] must be an object, got str"),
        ({"messages": [{"role": "x", "content": ""}]}, MessagesFormat(), "role is 'x'; known"),
        ({"messages": [{"role": [], "content": ""}]}, MessagesFormat(), r"role is \[\]"),
        ({"messages": [USER, {"role": "assistant"}]}, MessagesFormat(), "content must be text but"),
        ({"messages": [USER]}, MessagesFormat(), "no assistant message"),
        (
            {"messages": [USER, BOT | {"tool_calls": [{"function": {"name": "f"}}]}]},
            MessagesFormat(),
            r"messages\[1\]\.tool_calls is not read",
        ),
        (
            {"messages": [USER, BOT | {"weight": 0}]},
            MessagesFormat(),
            r"\[1\]\.weight is 0, but every",
        ),
        ({"messages": [USER, BOT | {"content": ""}]}, MessagesFormat(), "no assistant message"),
        ({"prompt": "x"}, PromptResponseFormat(), "response must be text but is missing"),
        ({"instruction": 3, "output": "y"}, AlpacaFormat(), "instruction must be text but is int"),
        ({"instruction": "x", "input": 3, "output": "y"}, AlpacaFormat(), "'input' must be text"),
        (
            {"conversations": [{"from": "function_call", "value": "{}"}]},
            ShareGPTFormat(),
            "from is 'function_call'",
        ),
    ],
)
def test_malformed_rows_name_file_and_row(
    columns: dict[str, Any], format: RowFormat, part: str
) -> None:
    with pytest.raises(DataError, match=rf"^f\.jsonl, row 7: .*{part}"):
        to_messages(row(**columns), format, None)


def test_text_column() -> None:
    assert to_text(row(body="x"), TextFormat(column="body")) == "x"
    with pytest.raises(DataError, match=r"row 7: text must be text but is missing \(columns: body"):
        to_text(row(body="x"), TextFormat())
