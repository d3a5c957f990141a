"""Rules about the shape of the source: sizes, names, docstrings, nothing left behind."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arch.source_tree import ROOT, Function, functions, name_of, parse, source_files

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
VAGUE_NAMES = {"utils", "util", "common", "helpers", "misc", "tools"}
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError")


def test_there_is_something_to_check() -> None:
    assert len(source_files()) > 60


def test_files_are_short() -> None:
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in source_files()}
    assert {n: length for n, length in lengths.items() if length > MAX_FILE_LINES} == {}


def _body_lines(function: Function) -> int:
    """Lines after signature and docstring: a command's options are a table, not code."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_are_short() -> None:
    lengths = {
        f"{name_of(file)}:{f.name}": _body_lines(f)
        for file in source_files()
        for f in functions(parse(file))
    }
    assert {n: length for n, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_no_file_is_a_drawer() -> None:
    vague = [name_of(f) for f in source_files() if f.stem in VAGUE_NAMES]
    assert vague == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [name_of(file) for file in source_files() if not ast.get_docstring(parse(file))]
    assert silent == []


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{name_of(file)}:{number}"
        for file in source_files()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert found == []


def _undocumented(tree: ast.AST, inherited: set[str], in_class: bool = False) -> Iterator[str]:
    for item in ast.iter_child_nodes(tree):
        if not isinstance(item, (*Function.__args__, ast.ClassDef)) or item.name.startswith("_"):
            continue
        documented = (
            bool(ast.get_docstring(item))
            or (in_class and item.name in inherited)
            or any(ast.unparse(line).endswith(".setter") for line in item.decorator_list)
        )
        if not documented:
            yield item.name
        if isinstance(item, ast.ClassDef):
            yield from (f"{item.name}.{n}" for n in _undocumented(item, inherited, in_class=True))


def _protocol_methods() -> set[str]:
    """Methods documented once, in a Protocol; implementations need not repeat it."""
    return {
        method.name
        for file in source_files()
        for item in ast.walk(parse(file))
        if isinstance(item, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id == "Protocol" for base in item.bases)
        for method in item.body
        if isinstance(method, Function) and ast.get_docstring(method)
    }


def test_public_functions_and_classes_are_documented() -> None:
    inherited = _protocol_methods()
    silent = [
        f"{name_of(file)}:{name}"
        for file in source_files()
        for name in _undocumented(parse(file), inherited)
    ]
    assert silent == []


@pytest.mark.parametrize("module", ["pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"])
def test_weights_are_never_unpickled(module: str) -> None:
    importing = [name_of(f) for f in source_files() if module in _imported(f)]
    assert importing == []


def _imported(file: Path) -> set[str]:
    names: set[str] = set()
    for item in ast.walk(parse(file)):
        if isinstance(item, ast.Import):
            names |= {alias.name.split(".")[0] for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.module:
            names.add(item.module.split(".")[0])
    return names


def test_torch_load_and_save_are_not_used() -> None:
    calls = [
        f"{name_of(file)}:{item.lineno}"
        for file in source_files()
        for item in ast.walk(parse(file))
        if isinstance(item, ast.Attribute)
        and item.attr in ("load", "save")
        and isinstance(item.value, ast.Name)
        and item.value.id == "torch"
    ]
    assert calls == []


def test_parameter_names_are_spelled_in_the_schema_only() -> None:
    full_name = re.compile(r"^(model\.(layers\.\d|embed_tokens|norm)|lm_head\.weight)")
    allowed = {"qwen2kit/spec/schema.py"}
    spelled = [
        f"{name_of(file)}:{item.lineno}"
        for file in source_files()
        if name_of(file) not in allowed
        for item in ast.walk(parse(file))
        if isinstance(item, ast.Constant)
        and isinstance(item.value, str)
        and full_name.match(item.value)
    ]
    assert spelled == []


def test_no_committed_file_names_a_private_path() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    private = re.compile(r"(?<![\w.])/(work|home|root|tmp)/\w")
    found = []
    for name in filter(None, tracked.stdout.split("\0")):
        file = ROOT / name
        if file.is_file() and file.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ""}:
            text = file.read_text(errors="replace")
            found += [f"{name}: {match[0]}" for match in private.finditer(text)]
    assert found == []
