"""The three spellings of RoPE settings in ``config.json``, read strictly and written doubly.

1. ``rope_theta`` alone; 2. ``rope_theta`` + ``rope_scaling`` with ``type`` or ``rope_type``;
3. ``rope_parameters`` holding everything (transformers 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen2kit.errors import ConfigError
from qwen2kit.spec.model import LinearScaling, RoPESpec, YarnScaling

_DEFAULT_THETA = 10_000.0  # transformers' Qwen2Config default when the key is absent
_YARN_OPTIONAL = (
    "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip


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
        for key in _YARN_OPTIONAL:
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
    theta = _positive("rope_theta", _DEFAULT_THETA if theta is None else theta)
    return RoPESpec(rope_theta=theta, scaling=_scaling(scaling or {}))


def _scaling(entry: object) -> YarnScaling | LinearScaling | None:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"config.json: RoPE scaling must be an object, got {entry!r}")
    kind = entry.get("rope_type", entry.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "factor"}
    if kind == "yarn":
        known |= {"original_max_position_embeddings", *_YARN_OPTIONAL}
    unknown = {key for key, value in entry.items() if value is not None} - known
    if unknown:
        raise ConfigError(f"config.json: unknown RoPE keys for type {kind!r}: {sorted(unknown)}")
    if kind == "default":
        return None
    if kind not in ("yarn", "linear"):
        raise ConfigError(f"config.json: RoPE type {kind!r} is not supported (default, linear, yarn)")
    factor = _positive("factor", entry.get("factor"))
    if kind == "linear":
        return LinearScaling(factor=factor)
    original = entry.get("original_max_position_embeddings")
    if not isinstance(original, int) or original <= 0:
        raise ConfigError(
            "config.json: YaRN needs original_max_position_embeddings (the training length, "
            "32768 for Qwen2)"
        )
    options = {key: entry[key] for key in _YARN_OPTIONAL if entry.get(key) is not None}
    return YarnScaling(factor=factor, original_max_position_embeddings=original, **options)


def _positive(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"config.json: {key} must be a positive number, got {value!r}")
    return float(value)
