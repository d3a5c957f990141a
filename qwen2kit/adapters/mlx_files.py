"""mlx-lm's adapter directories: ``adapter_config.json`` and ``adapters.safetensors``, in and out.

mlx-lm computes ``y + scale * (x @ lora_a) @ lora_b``: its factors are the transposes of PEFT's,
``<path>.lora_a`` ``[in, r]`` and ``<path>.lora_b`` ``[r, out]``. One rank and one scale serve the
whole adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen2kit.adapters.base_mark import KEY, stored
from qwen2kit.adapters.lora import Adapter, LowRank, finite_number, pair_up
from qwen2kit.errors import ConfigError, WeightError
from qwen2kit.partial_file import write_text_atomically
from qwen2kit.weights.hf_layout import read_json
from qwen2kit.weights.safetensors_read import SafetensorsFile
from qwen2kit.weights.safetensors_write import write_safetensors
from qwen2kit.weights.tensor import DType, HostTensor, from_bits, from_numpy

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
_SIDES = ("lora_a", "lora_b")
_ALL_LAYERS = -1


def read_mlx(directory: Path) -> Adapter:
    """Read an mlx-lm LoRA adapter.

    Raises:
        ConfigError: the config is not of a LoRA adapter.
        WeightError: the tensors are missing or damaged, or are not low-rank updates.
    """
    config = read_json(directory / CONFIG_FILE)
    scale, dropout = _parameters(directory / CONFIG_FILE, config)
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise WeightError(f"{path}: absent; the adapter is incomplete")
    factors: dict[str, dict[str, HostTensor]] = {}
    file = SafetensorsFile(path)
    for name in file.names():
        module, _, side = name.rpartition(".")
        if side not in _SIDES or len(file.info(name).shape) != 2:
            raise WeightError(
                f"{path}: tensor {name[:100]!r} is not a low-rank update of a matrix; only plain "
                "LoRA adapters of linear layers are read"
            )
        factors.setdefault(module, {})[side] = _transposed(file.read(name))
    model = config.get("model")
    return Adapter(
        path=directory,
        format="mlx",
        modules={m: LowRank(a, b, scale) for m, a, b in pair_up(path, factors, _SIDES)},
        base_model=model if isinstance(model, str) and model else None,
        dropout=dropout,
        base_mark=file.metadata.get(KEY),
    )


def write_mlx(adapter: Adapter, directory: Path, dtype: DType) -> None:
    """Write ``adapter`` into an existing directory, its config last.

    Raises:
        ConfigError: its modules differ in rank or scale, which mlx-lm cannot express.
    """
    kinds = {(update.rank, update.scale) for update in adapter.modules.values()}
    if len(kinds) > 1:
        raise ConfigError(
            f"{adapter.path}: has modules of different rank or scale, which mlx-lm's layout cannot "
            "hold; merge it: qwen2kit convert BASE OUT --to mlx --adapter ADAPTER"
        )
    rank, scale = kinds.pop()
    metadata = stored(adapter.base_mark, "mlx")
    write_safetensors(directory / WEIGHTS_FILE, _stored(adapter, dtype), metadata=metadata)
    document = {
        "fine_tune_type": "lora",
        "model": adapter.base_model,
        "num_layers": _ALL_LAYERS,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": adapter.dropout,
            "keys": sorted({_inside_layer(module) for module in adapter.modules}),
        },
    }
    write_text_atomically(directory / CONFIG_FILE, json.dumps(document, indent=2) + "\n")


def _parameters(path: Path, config: Mapping[str, Any]) -> tuple[float, float]:
    """Scale and dropout of a config."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ConfigError(f"{path}: fine_tune_type is {kind!r}: only lora is read")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ConfigError(f"{path}: has no lora_parameters; this is not an mlx-lm LoRA adapter")
    scale = finite_number(path, "lora_parameters.scale", parameters.get("scale"))
    return scale, finite_number(path, "lora_parameters.dropout", parameters.get("dropout", 0.0))


def _stored(adapter: Adapter, dtype: DType) -> Iterator[tuple[str, HostTensor]]:
    for module, update in adapter.modules.items():
        for side, factor in zip(_SIDES, (update.a, update.b), strict=True):
            yield f"{module}.{side}", _transposed(factor.astype(dtype))


def _inside_layer(module: str) -> str:
    """``self_attn.q_proj`` of a module path."""
    return module.partition(".layers.")[2].partition(".")[2]


def _transposed(tensor: HostTensor) -> HostTensor:
    turned = np.ascontiguousarray(tensor.raw().T)
    return from_bits(turned) if tensor.dtype == "bfloat16" else from_numpy(turned)
