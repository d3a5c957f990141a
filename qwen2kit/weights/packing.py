"""The ``quantization_config`` entry of AWQ and GPTQ checkpoints: which encoding the files use.

AWQ is arXiv 2306.00978, GPTQ arXiv 2210.17323; the encodings are those that AutoAWQ (``gemm``)
and AutoGPTQ / GPTQModel (``gptq``, ``gptq_v2``) write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen2kit.errors import WeightError

Method = Literal["awq", "gptq"]
_BITS = {"awq": (4,), "gptq": (2, 4, 8)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the linear layers of a checkpoint are packed into integers.

    Attributes:
        method: ``awq`` or ``gptq``.
        version: ``gemm`` for AWQ; ``gptq`` (zero points stored minus one) or ``gptq_v2``.
        bits: per weight: 4 for AWQ; 2, 4 or 8 for GPTQ.
        group_size: inputs that share a scale and a zero point; -1: all inputs of an output.
        symmetric: whether every zero point is the middle of the range.
        act_order: whether inputs were quantised by falling activation (``desc_act``).
    """

    method: Method
    version: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool

    def groups(self, width: int) -> int:
        """Number of groups among ``width`` inputs."""
        return 1 if self.group_size == -1 else -(-width // self.group_size)

    def describe(self) -> str:
        """One phrase, such as ``AWQ (gemm) 4-bit, groups of 128, asymmetric``."""
        size = "one group per row" if self.group_size == -1 else f"groups of {self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        order = ", activation order" if self.act_order else ""
        return f"{self.method.upper()} ({self.version}) {self.bits}-bit, {size}, {kind}{order}"


def read_packing(config: Mapping[str, Any]) -> Packing | None:
    """The AWQ or GPTQ encoding that ``config.json`` announces, or None for any other file.

    Raises:
        WeightError: another quantisation method, or a variant of these two that is not read.
    """
    entry = config.get("quantization_config")
    if not isinstance(entry, Mapping) or "quant_method" not in entry:
        return None
    method = entry["quant_method"]
    if method == "awq":
        return _read_awq(entry)
    if method == "gptq":
        return _read_gptq(entry)
    raise _refusal(f"with {method!r}", "")


def _read_awq(entry: Mapping[str, Any]) -> Packing:
    version = str(entry.get("version", entry.get("format", "gemm"))).lower()
    if version != "gemm":
        raise _refusal(f"with AWQ version {version!r}", "only gemm is read; ")
    if entry.get("backend") == "llm-awq":
        raise _refusal("with AWQ by llm-awq", "only AutoAWQ's gemm layout is read; ")
    return Packing(
        method="awq",
        version=version,
        bits=_bits("awq", entry),
        group_size=_group_size("awq", entry),
        symmetric=not entry.get("zero_point", True),
        act_order=False,
    )


def _read_gptq(entry: Mapping[str, Any]) -> Packing:
    version = entry.get("checkpoint_format", entry.get("format", "gptq"))
    if entry.get("is_marlin_format"):
        version = "marlin"
    if version not in ("gptq", "gptq_v2"):
        raise _refusal(
            f"with GPTQ checkpoint_format {version!r}", "only gptq and gptq_v2 are read; "
        )
    if entry.get("dynamic"):
        raise _refusal("with GPTQ's per-module 'dynamic' settings", "")
    if entry.get("pack_dtype", "int32") != "int32":
        raise _refusal(f"with GPTQ pack_dtype {entry['pack_dtype']!r}", "only int32 is read; ")
    return Packing(
        method="gptq",
        version=version,
        bits=_bits("gptq", entry),
        group_size=_group_size("gptq", entry),
        symmetric=bool(entry.get("sym", True)),
        act_order=bool(entry.get("desc_act", False)),
    )


def _bits(method: Method, entry: Mapping[str, Any]) -> int:
    bits = entry.get("bits", entry.get("w_bit"))
    allowed = _BITS[method]
    if type(bits) is not int or bits not in allowed:
        listed = ", ".join(str(value) for value in allowed)
        raise _refusal(f"with {method.upper()} to {bits!r} bits", f"bits must be {listed}; ")
    return bits


def _group_size(method: Method, entry: Mapping[str, Any]) -> int:
    size = entry.get("group_size", entry.get("q_group_size", 128))
    if type(size) is not int or not (size == -1 or size > 0):
        raise _refusal(
            f"with {method.upper()} in groups of {size!r}",
            "group_size must be a positive integer or -1; ",
        )
    return size


def _refusal(how: str, expected: str) -> WeightError:
    return WeightError(
        f"the checkpoint is quantised {how}, which is not read; {expected}convert from the "
        "unquantised checkpoint"
    )
