"""PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors``, in and out.

A and B of the module ``path`` are stored as ``base_model.model.<path>.lora_A.weight`` ``[r, in]``
and ``...lora_B.weight`` ``[out, r]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from qwen2kit.adapters.base_mark import KEY, stored
from qwen2kit.adapters.lora import Adapter, LowRank, factor_names, pair_up
from qwen2kit.adapters.peft_config import PeftConfig, peft_document, read_peft_config
from qwen2kit.errors import WeightError
from qwen2kit.partial_file import write_text_atomically
from qwen2kit.weights.safetensors_read import SafetensorsFile
from qwen2kit.weights.safetensors_write import write_safetensors
from qwen2kit.weights.tensor import DType, HostTensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SIDES = ("lora_A", "lora_B")


def read_peft(directory: Path) -> Adapter:
    """Read a PEFT LoRA adapter; tensors stay in the mapped file.

    Raises:
        ConfigError: the config is not of a supported LoRA adapter.
        WeightError: the tensors are missing or damaged, do not match the config, or are not
            low-rank updates.
    """
    config = read_peft_config(directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        reason = "only adapter_model.bin, a pickle, which is not read" if pickled else "absent"
        raise WeightError(f"{path}: {reason}; save the adapter as safetensors")
    factors: dict[str, dict[str, HostTensor]] = {}
    file = SafetensorsFile(path)
    for name in file.names():
        module, side = _split(path, name)
        factors.setdefault(module, {})[side] = file.read(name)
    modules = {
        module: LowRank(a, b, config.scale_of(module))
        for module, a, b in pair_up(path, factors, _SIDES)
    }
    _check_against_config(path, config, modules)
    return Adapter(
        path=directory,
        format="hf",
        modules=modules,
        base_model=config.base_model,
        dropout=config.dropout,
        rslora=config.rslora,
        base_mark=file.metadata.get(KEY),
    )


def write_peft(adapter: Adapter, directory: Path, dtype: DType) -> None:
    """Write ``adapter`` into an existing directory, its config last."""
    metadata = stored(adapter.base_mark, "pt")
    write_safetensors(directory / WEIGHTS_FILE, _stored(adapter, dtype), metadata=metadata)
    text = json.dumps(peft_document(adapter), indent=2, ensure_ascii=False)
    write_text_atomically(directory / CONFIG_FILE, text + "\n")


def _stored(adapter: Adapter, dtype: DType) -> Iterator[tuple[str, HostTensor]]:
    for module, update in adapter.modules.items():
        for name, factor in zip(factor_names(module), (update.a, update.b), strict=True):
            yield _PREFIX + name, factor.astype(dtype)


def _split(path: Path, name: str) -> tuple[str, str]:
    parts = name.removeprefix(_PREFIX).rsplit(".", 2)
    if name.startswith(_PREFIX) and len(parts) == 3 and parts[1] in _SIDES and parts[2] == "weight":
        return parts[0], parts[1]
    raise WeightError(
        f"{path}: tensor {name[:100]!r} is not a low-rank update of a matrix; only plain LoRA "
        "adapters of linear layers are read"
    )


def _check_against_config(path: Path, config: PeftConfig, modules: dict[str, LowRank]) -> None:
    for module, update in modules.items():
        if update.rank != config.rank_of(module):
            raise WeightError(
                f"{path}: {module} has rank {update.rank}, {CONFIG_FILE} says "
                f"{config.rank_of(module)}"
            )
        if not config.targeted(module):
            raise WeightError(f"{path}: {module} is no target module of {CONFIG_FILE}")
    if isinstance(config.targets, tuple):
        for target in config.targets:
            if not any(m == target or m.endswith(f".{target}") for m in modules):
                raise WeightError(f"{path}: holds nothing for the target module {target!r}")
