"""The ``quantization`` entry of an MLX config.json: which tensors are packed, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen2kit.errors import ConfigError

BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Quantization:
    """Affine weight quantisation of a checkpoint.

    Attributes:
        bits: 2, 3, 4, 6 or 8.
        group_size: 32, 64 or 128 elements share a scale and a bias.
        overrides: ``(bits, group_size)`` of module paths that differ, None for those left dense.

    Raises:
        ConfigError: bits or group size has no MLX encoding.
    """

    bits: int
    group_size: int
    overrides: Mapping[str, tuple[int, int] | None] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for bits, size in ((self.bits, self.group_size), *filter(None, self.overrides.values())):
            if bits not in BITS:
                raise ConfigError(f"quantisation bits must be one of {BITS}, got {bits!r}")
            if size not in GROUP_SIZES:
                raise ConfigError(f"group size must be one of {GROUP_SIZES}, got {size!r}")

    def of(self, module: str) -> tuple[int, int] | None:
        """``(bits, group_size)`` of a module path (tensor name without ``.weight``)."""
        return self.overrides.get(module, (self.bits, self.group_size))

    def to_config(self) -> dict[str, Any]:
        """The ``quantization`` entry of config.json, as mlx-lm writes it."""
        return {
            "group_size": self.group_size,
            "bits": self.bits,
            "mode": "affine",
            **{
                module: False if pair is None else {"bits": pair[0], "group_size": pair[1]}
                for module, pair in self.overrides.items()
            },
        }


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """The MLX quantisation that ``config`` announces, or None.

    Raises:
        ConfigError: a mode other than affine, a missing number, or an unknown key.
    """
    entry = config.get("quantization") or config.get("quantization_config")
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise ConfigError(f"config.json: quantization must be an object, got {entry!r}")
    overrides: dict[str, tuple[int, int] | None] = {}
    for key, value in entry.items():
        if key in ("bits", "group_size", "mode"):
            continue
        if value is False:
            overrides[key] = None
        elif isinstance(value, Mapping):
            overrides[key] = _pair(f"quantization.{key}", {**entry, **value})
        elif value is not True:
            raise ConfigError(f"config.json: unknown key {key!r} in quantization")
    bits, group_size = _pair("quantization", entry)
    return Quantization(bits, group_size, overrides)


def _pair(where: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    mode = entry.get("mode", "affine")
    if mode != "affine":
        raise ConfigError(
            f"config.json: {where} has mode {mode!r}; only affine is read, convert from the "
            "unquantised checkpoint"
        )
    bits, size = entry.get("bits"), entry.get("group_size")
    if type(bits) is not int or type(size) is not int:
        raise ConfigError(f"config.json: {where} needs integers bits and group_size")
    return bits, size
