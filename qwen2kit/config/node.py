"""What every recipe node is made of: a strict frozen dataclass, and unions chosen by ``kind``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar, dataclass_transform, get_args

from qwen2kit.errors import ConfigError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def node(cls: type[T]) -> type[T]:
    """Make ``cls`` frozen, slotted, keyword-only and strict about unknown keys; read from a recipe
    it holds finite numbers only."""
    cls.__pydantic_config__ = {  # type: ignore[attr-defined]
        "extra": "forbid",
        "allow_inf_nan": False,
    }
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


class ByKind:
    """Annotates a union of nodes whose member is picked by its literal ``kind`` field."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        """A tagged union over the members' ``kind`` values (pydantic's protocol method)."""
        choices = {kind_of(cls): handler.generate_schema(cls) for cls in get_args(source)}
        return {
            "type": "tagged-union",
            "discriminator": "kind",
            "choices": choices,
            "custom_error_type": "kind",
            "custom_error_message": "kind must be one of {kinds}",
            "custom_error_context": {"kinds": ", ".join(choices)},
        }


def kind_of(cls: type[Any]) -> str:
    """The ``kind`` tag of a union member."""
    kind = next(field.default for field in fields(cls) if field.name == "kind")
    assert isinstance(kind, str)
    return kind


def check(*rules: tuple[bool, str]) -> None:
    """Raise one ConfigError that lists the message of every rule whose condition is false."""
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ConfigError("; ".join(broken))
