"""The three spellings of RoPE settings in ``config.json``, read strictly and written doubly.

1. ``rope_theta`` alone; 2. ``rope_theta`` + ``rope_scaling`` with ``type`` or ``rope_type``;
3. ``rope_parameters`` holding everything (transformers 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from qwen2kit.errors import ConfigError
from qwen2kit.spec.model import LinearScaling, RoPESpec, YarnScaling

_DEFAULT_THETA = 10_000.0  # transformers' Qwen2Config default when the key is absent
_YARN_NUMBERS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
_KNOWN = {
    "default": set[str](),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "truncate", *_YARN_NUMBERS},
}


def read_rope(config: Mapping[str, Any]) -> RoPESpec:
    """RoPE settings of a ``config.json`` mapping, from whichever spelling is present.

    Raises:
        ConfigError: the spellings contradict each other, the type is unsupported, a key is
            unknown, or YaRN lacks ``original_max_position_embeddings`` (transformers would then
            silently take ``max_position_embeddings``, which is wrong for the base models).
    """
    legacy = _read_legacy(config)
    modern = config.get("rope_parameters")
    if modern is None:
        return legacy or RoPESpec(rope_theta=_DEFAULT_THETA)
    if not isinstance(modern, Mapping):
        raise ConfigError(f"config.json: rope_parameters must be an object, got {modern!r}")
    theta = modern.get("rope_theta", config.get("rope_theta", _DEFAULT_THETA))
    rope = RoPESpec(rope_theta=_positive("rope_theta", theta), scaling=_scaling(modern))
    if legacy is not None and legacy != rope:
        raise ConfigError(
            "config.json: rope_parameters contradicts rope_theta/rope_scaling; remove one of them"
        )
    return rope


def write_rope(rope: RoPESpec) -> dict[str, Any]:
    """Both spellings of ``rope`` as ``config.json`` entries."""
    scaling: dict[str, Any] = {}
    if isinstance(rope.scaling, LinearScaling):
        scaling = {"rope_type": "linear", "factor": rope.scaling.factor}
    elif isinstance(rope.scaling, YarnScaling):
        yarn = rope.scaling
        scaling = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
        }
        default = YarnScaling(factor=1.0, original_max_position_embeddings=1)
        for key in (*_YARN_NUMBERS, "truncate"):
            if getattr(yarn, key) != getattr(default, key):
                scaling[key] = getattr(yarn, key)
    modern = {"rope_theta": rope.rope_theta, "rope_type": "default", **scaling}
    legacy = {"type": scaling["rope_type"], **scaling} if scaling else None
    return {
        "rope_theta": rope.rope_theta,
        "rope_scaling": legacy,
        "rope_parameters": modern,
    }


def _read_legacy(config: Mapping[str, Any]) -> RoPESpec | None:
    theta, scaling = config.get("rope_theta"), config.get("rope_scaling")
    if theta is None and scaling is None:
        return None
    inner = scaling.get("rope_theta") if isinstance(scaling, Mapping) else None
    if theta is not None and inner is not None and theta != inner:
        raise ConfigError("config.json: rope_theta differs between the top level and rope_scaling")
    if theta is None:
        theta = _DEFAULT_THETA if inner is None else inner
    return RoPESpec(
        rope_theta=_positive("rope_theta", theta),
        scaling=None if scaling is None else _scaling(scaling),
    )


def _scaling(entry: object) -> YarnScaling | LinearScaling | None:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"config.json: RoPE scaling must be an object, got {entry!r}")
    given = {key: value for key, value in entry.items() if value is not None}
    kind = _kind(given)
    unknown = set(given) - _KNOWN[kind] - {"rope_type", "type", "rope_theta"}
    if given.get("partial_rotary_factor") == 1:
        unknown.discard("partial_rotary_factor")
    if unknown:
        raise ConfigError(f"config.json: unknown RoPE keys for type {kind!r}: {sorted(unknown)}")
    if kind == "default":
        return None
    factor = _positive("factor", given.get("factor"))
    return LinearScaling(factor=factor) if kind == "linear" else _yarn(given, factor)


def _kind(given: Mapping[str, Any]) -> str:
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise ConfigError(
            f"config.json: RoPE type {kind!r} is not supported (default, linear, yarn)"
        )
    if given.get("type", kind) != kind:
        raise ConfigError(
            f"config.json: RoPE type={given['type']!r} contradicts rope_type={kind!r}"
        )
    return kind


def _yarn(given: Mapping[str, Any], factor: float) -> YarnScaling:
    original = given.get("original_max_position_embeddings")
    if type(original) is not int or original <= 0:
        raise ConfigError(
            "config.json: YaRN needs original_max_position_embeddings (the training length, "
            "32768 for Qwen2)"
        )
    truncate = given.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"config.json: YaRN truncate must be true or false, got {truncate!r}")
    numbers: dict[str, Any] = {
        key: _positive(key, given[key]) for key in _YARN_NUMBERS if key in given
    }
    return YarnScaling(
        factor=factor, original_max_position_embeddings=original, truncate=truncate, **numbers
    )


def _positive(key: str, value: object) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not isfinite(value) or value <= 0:  # type: ignore[arg-type,operator]
        raise ConfigError(f"config.json: {key} must be a positive number, got {value!r}")
    return float(value)  # type: ignore[arg-type]
