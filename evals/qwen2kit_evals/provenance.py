"""Which files, versions and settings a score belongs to."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwen2kit.backend.loading import LoadedModel

_BLOCKS = 64
_BLOCK_BYTES = 1 << 16
_HEAD_BYTES = 1 << 20


def model_provenance(loaded: LoadedModel) -> dict[str, Any]:
    """Files (with digests), spec size, backend, device, dtype and framework versions."""
    checkpoint = loaded.checkpoint
    quantization = checkpoint.quantization
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "files": file_digests(checkpoint.path),
        "adapter": None
        if checkpoint.adapter is None
        else {"path": str(checkpoint.adapter), "files": file_digests(checkpoint.adapter)},
        "quantization": None if quantization is None else str(quantization),
        "stored_dtype": checkpoint.dtype,
        "backend": loaded.backend.name,
        "versions": loaded.backend.versions() | _versions(),
        "requested": {"dtype": loaded.plan.dtype, "device": loaded.plan.device},
        "dtype": _dtype(loaded),
        "device": device_name(loaded),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def answers_digest(provenance: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a model's answers: its files, adapter, backend, device and dtype.

    Args:
        provenance: from `model_provenance`.
    """
    adapter = provenance["adapter"]
    parts = [provenance["files"], adapter and adapter["files"], provenance["backend"]]
    parts += [provenance["device"], provenance["dtype"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_digests(path: Path) -> dict[str, dict[str, Any]]:
    """Per file of a checkpoint: size in bytes, and SHA-256.

    Small files (config, tokenizer) are hashed whole. Of weight files the header and 64 blocks of
    64 KiB spread evenly are hashed: enough to tell fine-tunes of one model apart without reading
    hundreds of gigabytes.
    """
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    kept = [p for p in files if p.suffix in (".safetensors", ".gguf", ".json", ".jinja", ".txt")]
    return {p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in kept}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _HEAD_BYTES + _BLOCKS * _BLOCK_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        digest.update(file.read(_HEAD_BYTES))
        span = size - _HEAD_BYTES - _BLOCK_BYTES
        for block in range(_BLOCKS):
            file.seek(_HEAD_BYTES + span * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return f"sampled:{digest.hexdigest()}"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("qwen2kit", "lm_eval", "datasets", "tokenizers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(loaded: LoadedModel) -> str:
    """The device a model runs on, as its backend calls it."""
    if loaded.plan.device != "auto":
        return loaded.plan.device
    devices = loaded.backend.devices()
    return devices[0].name if devices else "unknown"


def _dtype(loaded: LoadedModel) -> str:
    """`ExecutionPlan.dtype`, with ``auto`` resolved by that field's rule."""
    if loaded.plan.dtype != "auto":
        return loaded.plan.dtype
    return "float32" if device_name(loaded).startswith("cpu") else "bfloat16"
