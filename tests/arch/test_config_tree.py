"""Every node of the recipe tree is frozen, documented and strict about unknown keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from qwen2kit.config.load import shipped
from qwen2kit.config.tree import RunConfig


def _dataclasses(hint: Any) -> Iterator[type[Any]]:
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _dataclasses(argument)


def _nodes(root: type[Any], seen: dict[type[Any], None]) -> dict[type[Any], None]:
    if root not in seen:
        seen[root] = None
        for hint in get_type_hints(root, include_extras=True).values():
            for node in _dataclasses(hint):
                _nodes(node, seen)
    return seen


NODES = list(_nodes(RunConfig, {}))


def test_the_tree_is_walked_completely() -> None:
    assert len(NODES) >= 10


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_node_is_frozen_slotted_and_strict(node: type[Any]) -> None:
    assert node.__pydantic_config__ == {"extra": "forbid", "allow_inf_nan": False}
    assert node.__dataclass_params__.frozen
    assert all(field.kw_only for field in fields(node))
    assert "__slots__" in vars(node)
    assert node.__doc__
    assert not node.__doc__.startswith(f"{node.__name__}(")


def test_nodes_cannot_be_changed() -> None:
    from qwen2kit.config.load import load_recipe

    config = load_recipe(shipped()[0])
    with pytest.raises(FrozenInstanceError):
        setattr(config, fields(config)[0].name, None)
