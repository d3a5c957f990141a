"""What the documentation promises exists: links, commands, options, keys of recipes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.arch.source_tree import ROOT, name_of

PAGES = tuple(
    sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_SEPARATORS = {"|", ">", "&&", ";"}


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def _anchors(page: Path) -> set[str]:
    """Headings as GitHub spells them in a link."""
    texts = (re.sub(r"[^\w\- ]", "", found.lower()) for found in _HEADING.findall(_prose(page)))
    return {text.replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in _anchors(target), f"{name_of(page)}: {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {(ROOT / link).resolve() for link in _LINK.findall(_prose(ROOT / "README.md"))}
    assert [name_of(page) for page in ROOT.glob("docs/*.md") if page not in linked] == []


def test_every_result_is_explained() -> None:
    folder = ROOT / "benchmarks/results"
    text = (folder / "README.md").read_text()
    figures = [file.name for file in folder.iterdir() if file.suffix in (".json", ".txt")]
    assert [name for name in figures if name not in text] == []


def _commands(page: Path) -> Iterator[list[str]]:
    """Words after ``qwen2kit`` of every command in the page's shell blocks."""
    for kind, text in _FENCE.findall(page.read_text()):
        if kind != "bash":
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for start, word in enumerate(words):
                named = Path(word).name == "qwen2kit" and words[start - 1 : start] != ["--model"]
                if named and (start == 0 or words[start - 1] in {*_SEPARATORS, "-m"}):
                    rest = words[start + 1 :]
                    ends = [i for i, part in enumerate(rest) if part in _SEPARATORS]
                    yield rest[: ends[0]] if ends else rest


@cache
def _root() -> Any:
    typer = pytest.importorskip("typer")
    from qwen2kit.cli.app import app

    return typer.main.get_command(app)


def _resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that ``words`` name, and what follows its name."""
    command, rest = _root(), list(words)
    while hasattr(command, "commands"):
        if rest and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        else:
            command = command.commands["run"]  # `eval MODEL` is `eval run MODEL`
    return command, rest


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_these_options(page: Path) -> None:
    for words in _commands(page):
        command, rest = _resolve(words)
        known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        options = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert options <= known, f"{name_of(page)}: qwen2kit {shlex.join(words)}"


def test_commands_were_found() -> None:
    found = [words for page in PAGES for words in _commands(page)]
    assert {words[0] for words in found} >= {"chat", "convert", "eval", "train", "serve", "plan"}


def _keys() -> Iterator[str]:
    """``section.key`` of a recipe wherever a page sets it as a command does, or in backquotes."""
    sections = "train|data|model|parallel|checkpoint|eval|logging|adapter|long"
    spelled = re.compile(rf"(?<![\w.])((?:{sections})\.[a-z_][a-z_.]*)(?==|`|\s=)")
    for page in PAGES:
        yield from (
            found
            for found in spelled.findall(page.read_text())
            if not found.endswith((".py", ".json"))
        )


def test_keys_of_recipes_exist() -> None:
    from qwen2kit.config import data_tree, train_tree, tree

    known = {
        name
        for module in (data_tree, train_tree, tree)
        for node in vars(module).values()
        for name in getattr(node, "__dataclass_fields__", {})
    }
    missing = {key for key in _keys() if not set(key.split(".")) <= known}
    assert missing == set()
