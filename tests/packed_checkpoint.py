"""AWQ and GPTQ checkpoints made from random codes, packed word by word from the formats' papers
and documentation; nothing here is shared with the reader under test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.tiny_checkpoint import write_tiny_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each nibble of a word holds
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What to write; the fields are those of the formats' own ``quantization_config``."""

    method: str = "gptq"
    bits: int = 4
    group_size: int = 32
    version: str = "gptq"
    symmetric: bool = False
    order: str = "absent"  # of g_idx: absent, plain, activation

    def config(self) -> dict[str, Any]:
        """``quantization_config`` as the reference writers produce it."""
        if self.method == "awq":
            return {
                "quant_method": "awq", "bits": 4, "group_size": self.group_size,
                "version": "gemm", "zero_point": True, "modules_to_not_convert": None,
            }  # fmt: skip
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size,
            "sym": self.symmetric, "desc_act": self.order == "activation",
            "checkpoint_format": self.version, "damp_percent": 0.01, "true_sequential": True,
        }  # fmt: skip


def pack_layer(kind: Kind, out: int, width: int, seed: int) -> tuple[Arrays, NDArray[np.float64]]:
    """Stored tensors of one random layer, and the dense ``[out, in]`` they stand for."""
    rng = np.random.default_rng(seed)
    size = width if kind.group_size == -1 else kind.group_size
    groups, top = -(-width // size), (1 << kind.bits) - 1
    codes = rng.integers(0, top + 1, (width, out))
    zeros = rng.integers(1, top + 1, (groups, out))
    if kind.symmetric:
        zeros[:] = 1 << (kind.bits - 1)
    scales = (rng.uniform(0.2, 1.0, (groups, out)) * 0.5 / top).astype(np.float16)
    index = np.arange(width) // size
    if kind.order == "activation":
        index = rng.permutation(index)
    dense = (codes - zeros[index]).astype(np.float64) * scales.astype(np.float64)[index]
    if kind.method == "awq":
        stored = {"qweight": _nibbles(codes), "qzeros": _nibbles(zeros)}
    else:
        shift = 1 if kind.version == "gptq" else 0
        stored = {
            "qweight": _words(codes.T, kind.bits).T.copy(),
            "qzeros": _words(zeros - shift, kind.bits),
        }
    if kind.order != "absent":
        stored["g_idx"] = index.astype(np.int32)
    return stored | {"scales": scales}, dense.T


def write_packed_checkpoint(
    directory: Path, kind: Kind, *, seed: int = 0, zero_biases: bool = False, **spec: Any
) -> dict[str, NDArray[np.float64]]:
    """A tiny model whose decoder layers are packed; returns the dense values of those."""
    write_tiny_checkpoint(directory, seed=seed, **spec)
    path = directory / "model.safetensors"
    tensors: Arrays = {name: value.astype(np.float16) for name, value in load_file(path).items()}
    dense = {}
    for number, name in enumerate(sorted(tensors)):
        if not name.endswith("_proj.weight"):
            continue
        module = name.removesuffix(".weight")
        out, width = tensors.pop(name).shape
        stored, dense[name] = pack_layer(kind, out, width, seed + number)
        tensors |= {f"{module}.{part}": value for part, value in stored.items()}
        if zero_biases and f"{module}.bias" not in tensors:
            tensors[f"{module}.bias"] = np.zeros(out, dtype=np.float16)
    save_file(tensors, path, metadata={"format": "pt"})
    edit_config(directory, quantization_config=kind.config(), torch_dtype="float16")
    return dense


def edit_config(directory: Path, **changes: object) -> None:
    """Change keys of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _words(codes: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Along the last dimension, lowest bits first."""
    per = 32 // bits
    cells = codes.reshape(len(codes), -1, per).astype(np.uint64)
    words = np.zeros(cells.shape[:-1], dtype=np.uint64)
    for position in range(per):
        words |= cells[..., position] << np.uint64(bits * position)
    return words.astype(np.uint32).view(np.int32)


def _nibbles(codes: NDArray[np.int64]) -> NDArray[np.int32]:
    """AWQ's interleaved nibbles along the outputs."""
    order = [8 * (j // 8) + AWQ_ORDER[j % 8] for j in range(codes.shape[1])]
    return _words(codes[:, order], 4)
