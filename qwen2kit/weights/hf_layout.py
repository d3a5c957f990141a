"""A directory in Hugging Face layout: config.json and safetensors, single or sharded.

Finds the weight files, follows the index strictly, and refuses storage that is not safetensors
(pickles, adapters) by name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qwen2kit.errors import ConfigError, WeightError
from qwen2kit.weights.safetensors_read import SafetensorsFile, SafetensorsSource
from qwen2kit.weights.safetensors_write import INDEX_NAME

_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``.

    Raises:
        ConfigError: the file cannot be read or does not hold a JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON; download or write it again") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return document


def open_weights(directory: Path) -> SafetensorsSource:
    """All tensors of a model directory by their names on disk.

    Raises:
        WeightError: no safetensors (the message says what is there instead), a shard is missing,
            or the index and the shards disagree.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        return _open_indexed(directory, index)
    paths = sorted(directory.glob("model*.safetensors"))
    if not paths:
        raise WeightError(_why_no_weights(directory))
    counts = {match[1] for path in paths if (match := _SHARD.fullmatch(path.name))}
    if counts and (len(counts) > 1 or int(counts.pop()) != len(paths)):
        raise WeightError(
            f"{directory}: has {len(paths)} of the shards their names promise and no {INDEX_NAME}; "
            "download the missing files"
        )
    return SafetensorsSource([SafetensorsFile(path) for path in paths])


def _open_indexed(directory: Path, index: Path) -> SafetensorsSource:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(f"{index}: has no weight_map; download it again")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(_safe_name(index, shard), set()).add(name)
    if "model.safetensors" not in shards and (directory / "model.safetensors").exists():
        raise WeightError(
            f"{directory}: holds both model.safetensors and an index that does not list it; "
            "remove the stale one"
        )
    files = []
    for shard, listed in shards.items():
        if not (directory / shard).is_file():
            raise WeightError(f"{directory}: shard {shard} is missing; download it")
        file = SafetensorsFile(directory / shard)
        _check_listed(index, shard, listed, set(file.names()))
        files.append(file)
    return SafetensorsSource(files)


def _safe_name(index: Path, shard: object) -> str:
    plain = isinstance(shard, str) and shard == Path(shard).name and "\\" not in shard
    if not plain or not str(shard).endswith(".safetensors"):
        raise WeightError(
            f"{index}: shard name {str(shard)[:80]!r} is not a plain .safetensors name"
        )
    return str(shard)


def _check_listed(index: Path, shard: str, listed: set[str], present: set[str]) -> None:
    for names, problem in (
        (listed - present, "does not hold"),
        (present - listed, "also holds, though the index does not say so,"),
    ):
        if names:
            raise WeightError(
                f"{index.parent}: {shard} {problem} {min(names)!r} ({len(names)} such tensors); "
                f"{INDEX_NAME} belongs to other files, download both again"
            )


def _why_no_weights(directory: Path) -> str:
    names = {path.name for path in directory.iterdir()}
    if any(
        name.startswith("pytorch_model") or name.endswith((".bin", ".pt", ".pth")) for name in names
    ):
        return (
            f"{directory}: only pickle weights (*.bin) found, which can run code and are not read; "
            "get the safetensors version"
        )
    if "adapter_model.safetensors" in names:
        return f"{directory}: is a LoRA adapter, not a model; merge it into its base model first"
    return f"{directory}: no model*.safetensors found; is the download complete?"
