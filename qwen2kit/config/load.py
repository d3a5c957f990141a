"""TOML recipe + ``extends`` + ``key=value`` overrides -> RunConfig, with all errors at once.

The only file that imports pydantic. Values are taken strictly: ``"3"`` is not a number.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

from qwen2kit.config.tree import RunConfig
from qwen2kit.errors import ConfigError

_REPLACES = {
    "steps": ("epochs",),
    "epochs": ("steps",),
    "preset": ("checkpoint",),
    "checkpoint": ("preset", "tokenizer"),
}


def shipped() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    folder = files("qwen2kit.recipes")
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml")))


def find_recipe(recipe: str) -> Path:
    """The file behind ``recipe``: a path, or the name of a shipped recipe.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    name = recipe.removesuffix(".toml")
    if name in shipped():
        return Path(str(files("qwen2kit.recipes") / f"{name}.toml"))
    raise ConfigError(f"no recipe {recipe!r}: give a TOML file or one of {', '.join(shipped())}")


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``recipe`` and apply ``key=value`` overrides (dotted keys, TOML values).

    Raises:
        ConfigError: the file is not TOML, ``extends`` is circular, an override has no ``=``, or
            any value or key is wrong; one message lists every problem with its dotted path.
    """
    path = find_recipe(str(recipe))
    return parse(override(_read(path, ()), overrides), source=path.name)


def override(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``tree`` with ``key=value`` overrides applied in order. Another ``kind`` removes
    what belongs to the old one, so one that is set once comes first.

    Raises:
        ConfigError: an override has no ``=`` or goes through something that is not a table.
    """
    changed = deepcopy(dict(tree))
    keys = Counter(map(_key, overrides))

    def place(text: str) -> tuple[bool, int]:
        key = _key(text)
        early = key.endswith(".kind") and keys[key] == 1
        return not early, key.count(".") if early else 0  # an outer kind before an inner one

    for text in sorted(overrides, key=place):
        _apply(changed, text)
    return changed


def parse(tree: Mapping[str, Any], *, source: str) -> RunConfig:
    """Validate a nested mapping; ``source`` starts the error message.

    Raises:
        ConfigError: listing every problem.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        text = json.dumps(tree, default=str)
        return TypeAdapter(RunConfig).validate_json(text, strict=True)
    except ValidationError as error:
        problems = [_describe(item, tree) for item in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from None


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in chain:
        raise ConfigError(f"{path.name}: extends leads back to itself")
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: not valid TOML: {error}") from None
    bases = own.pop("extends", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path.name}: extends must be a list of file names")
    tree: dict[str, Any] = {}
    for base in bases:
        sibling = path.parent / base
        file = sibling if sibling.is_file() else find_recipe(base)
        _merge(tree, _read(file, (*chain, resolved)))
    _merge(tree, own)
    return tree


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Lay ``other`` over ``tree``; a table whose ``kind`` changes is replaced as a whole."""
    for key in other:
        _make_way(tree, key)  # before any is set: two exclusive ones in one file are an error
    for key, value in other.items():
        old = tree.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_kind(old, value):
            _merge(old, value)
        else:
            tree[key] = value


def _same_kind(old: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return bool(value.get("kind", old.get("kind")) == old.get("kind"))


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"override {override!r} must look like train.lr=1e-4")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    place = tree
    for depth, part in enumerate(path[:-1], 1):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(path[:depth])} is not a table")
    if path[-1] == "kind" and place.get("kind", value) != value:
        place.clear()
    _make_way(place, path[-1])
    place[path[-1]] = value


def _make_way(place: dict[str, Any], key: str) -> None:
    """Remove what ``key`` takes the place of."""
    for other in _REPLACES.get(key, ()):
        place.pop(other, None)


def _describe(error: Any, tree: Mapping[str, Any]) -> str:
    where = _dotted(error["loc"], tree)
    kind, given = error["type"], error["input"]
    if kind == "unexpected_keyword_argument":
        return f"{where}: unknown key"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "kind":
        got = given.get("kind") if isinstance(given, dict) else given
        return f"{where}.{error['msg']}, got {got!r}"
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    if kind == "value_error" or isinstance(given, dict):
        return f"{where}: {message}" if where else message
    return f"{where} {message}, got {given!r}"


def _dotted(loc: Sequence[int | str], tree: Any) -> str:
    """``loc`` without the union tags that pydantic puts into it."""
    parts: list[str] = []
    place = tree
    for item in loc:
        if isinstance(place, dict) and item not in place and place.get("kind") == item:
            continue
        parts.append(str(item))
        place = place[item] if _has(place, item) else None
    return ".".join(parts)


def _has(place: Any, item: int | str) -> bool:
    if isinstance(place, dict):
        return item in place
    return isinstance(place, list) and isinstance(item, int) and item < len(place)
