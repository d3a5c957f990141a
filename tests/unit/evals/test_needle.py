"""Needle in a haystack: prompts of exact length, depths, exact scoring, the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.errors import ConfigError, DataError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit_evals.heat_map import draw_heat_map, short
from qwen2kit_evals.needle import (
    Cell,
    Haystack,
    NeedleRow,
    accuracies,
    ask,
    first_number,
    grid,
    run_needles,
)
from qwen2kit_evals.request_log import RequestLog
from tests.scripted_model import ScriptedModel
from tests.unit.evals.reference_lm import load_reference

ESSAY = "The cat sat on the mat. Did the dog run? It ran and ran!\n\nOne two three. " * 30


class Finder(ScriptedModel):
    """A model that reads its prompt: it repeats the number if that is early enough."""

    def __init__(self, tokenizer: Tokenizer, reach: float, spec: ModelSpec) -> None:
        super().__init__(spec, self._answer)
        self.tokenizer, self.reach = tokenizer, reach
        self.prompts = 0

    def _answer(self, prompt: tuple[int, ...]) -> Sequence[int]:
        self.prompts += 1
        text = self.tokenizer.decode(list(prompt))
        found = re.search(r"secret number of \w+ is (\d+)", text)
        assert found
        depth = found.start() / len(text)
        said = f" {found[1]}, I say." if depth <= self.reach else " 12."
        return [*self.tokenizer.encode(said), self.tokenizer.im_end_id]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return load_reference(tiny).tokenizer


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Haystack:
    directory = tmp_path_factory.mktemp("essays")
    for name in ("b.txt", "a.md"):
        (directory / name).write_text(f"Essay {name[0]}. {ESSAY}")
    return Haystack(directory, tokenizer)


def finder(tiny: Path, reach: float) -> Any:
    loaded = load_reference(tiny)
    spec = replace(loaded.checkpoint.spec, max_position_embeddings=4096)
    model: Any = Finder(loaded.tokenizer, reach, spec)
    return replace(loaded, model=model)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("length", [512, 1000, 3000])
def test_prompts_fill_their_length_and_hold_the_fact_once(
    haystack: Haystack, tokenizer: Tokenizer, length: int, chat: bool
) -> None:
    longest = max(len(tokenizer.encode(" " + s)) for s in re.split(r"(?<=[.?!])\s+", ESSAY))
    question = ask(haystack, Cell(length=length, depth=50), chat=chat, seed=1)
    assert question.tokens == len(tokenizer.encode(question.prompt))
    assert length - 2 * longest - 4 <= question.tokens <= length
    assert question.prompt.count(f"is {question.expected}.") == 1
    assert question.prompt.endswith("<|im_start|>assistant\n" if chat else " is")
    assert "Essay a." in question.prompt.split("\n\n")[1]  # files are joined in order of names


def test_depth_is_where_the_fact_is(haystack: Haystack) -> None:
    for depth in (0, 25, 50, 75, 100):
        question = ask(haystack, Cell(length=2000, depth=depth), chat=False, seed=3)
        text = question.prompt.split("\n\n")[1]
        before, after = re.split(r"The secret number of \w+ is \d+\.", text)
        actual = 100 * len(before) / (len(before) + len(after))
        assert actual == pytest.approx(question.depth, abs=2)
        assert abs(question.depth - depth) < 2.5
        assert before == "" or before.rstrip()[-1] in ".?!"
        assert depth != 0 or before == ""
        assert depth != 100 or after.strip() == ""


def test_every_cell_hides_another_number(haystack: Haystack) -> None:
    cells = grid([700, 600], [0, 50, 50], repeats=3)
    assert [cell.length for cell in cells] == [600] * 6 + [700] * 6
    numbers = [ask(haystack, cell, chat=False, seed=0).expected for cell in cells]
    assert len({*numbers}) == 12
    assert numbers == [ask(haystack, cell, chat=False, seed=0).expected for cell in cells]
    assert numbers[0] != ask(haystack, cells[0], chat=False, seed=1).expected


def test_answers_are_scored_exactly_and_resumed(
    tiny: Path, haystack: Haystack, tmp_path: Path
) -> None:
    loaded = finder(tiny, reach=0.6)
    cells = grid([600, 1200], [0, 50, 100])

    def run() -> list[NeedleRow]:
        with RequestLog(tmp_path / "requests.jsonl") as log:
            return run_needles(
                loaded, haystack, cells, chat=False, seed=5, batch_size=2, log=log
            )  # fmt: skip

    rows = run()
    assert [row.correct for row in rows] == [True, True, False] * 2
    assert all(row.answer.strip().startswith(row.expected) for row in rows if row.correct)
    assert run() == rows
    assert loaded.model.prompts == 6
    means = accuracies(rows)
    assert [(m["length"], m["depth"], m["accuracy"]) for m in means] == [
        (600, 0, 1.0), (600, 50, 1.0), (600, 100, 0.0),
        (1200, 0, 1.0), (1200, 50, 1.0), (1200, 100, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 1234567.", "1234567"), ("It is 1,234,567", "1234567"), ("12 or 1234567", "12"),
        ("none", None), ("12345678", "12345678"), ("1 234 567", "1234567"), ("", None),
    ],
)  # fmt: skip
def test_the_first_number_counts(text: str, number: str | None) -> None:
    assert first_number(text) == number


def test_what_cannot_be_asked_is_refused(tiny: Path, haystack: Haystack, tmp_path: Path) -> None:
    loaded = finder(tiny, reach=1)
    with RequestLog() as log:
        options: dict[str, Any] = {"chat": False, "seed": 0, "batch_size": 1, "log": log}
        with pytest.raises(ConfigError, match="exceeds what this model takes beside an answer"):
            run_needles(loaded, haystack, grid([4096], [0]), **options)
        with pytest.raises(ConfigError, match="the question alone has"):
            run_needles(loaded, haystack, grid([20], [0]), **options)
    with pytest.raises(ConfigError, match="--depths"):
        grid([100], [101])
    with pytest.raises(DataError, match="holds no text"):
        Haystack(tmp_path, loaded.tokenizer)


def test_the_picture_shows_every_cell(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    cells = [
        {"length": length, "depth": depth, "accuracy": float(depth == 0)}
        for length in (1024, 2048)
        for depth in (0, 100)
    ]
    draw_heat_map(cells, tmp_path / "map.png", title="title")
    pixels = imread(tmp_path / "map.png")
    grid_part = pixels[:, : pixels.shape[1] * 2 // 3]  # without the colour bar
    green = grid_part[..., 1] > grid_part[..., 0] + 0.3
    red = grid_part[..., 0] > grid_part[..., 1] + 0.3
    height = len(pixels)
    top, bottom = (
        slice(height * 15 // 100, height * 2 // 5),
        slice(height * 55 // 100, height * 3 // 4),
    )
    assert green[top].sum() > 10_000 > 100 > red[top].sum()
    assert red[bottom].sum() > 10_000 > 100 > green[bottom].sum()
    assert (short(4096), short(4000)) == ("4k", "4,000")
