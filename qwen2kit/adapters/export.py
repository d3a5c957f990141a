"""A trained adapter as a PEFT directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qwen2kit.adapters.directory import write_adapter
from qwen2kit.adapters.lora import WEIGHT, Adapter, LowRank, lora_scale
from qwen2kit.config.tree import AdapterConfig
from qwen2kit.weights.locate import locate
from qwen2kit.weights.tensor import DType, HostTensor


def export_adapter(
    directory: Path,
    config: AdapterConfig,
    factors: Iterable[tuple[str, HostTensor]],
    *,
    base_model: str,
    dtype: DType,
    base_mark: str | None = None,
) -> None:
    """Write ``directory`` (replacing an adapter there); it appears only when complete.

    Args:
        config: the recipe's ``[adapter]``.
        factors: A ``[r, in]`` and B ``[out, r]`` of every adapted module, by parameter name
            (`factor_names`).
        base_model: the recipe's ``model.checkpoint``; a local path is made absolute.
        dtype: of the stored factors.
        base_mark: `base_mark.mark` of the weights it was trained on, if known.

    Raises:
        OSError: the disk is full or not writable.
    """
    tensors = dict(factors)
    scale = lora_scale(config.rank, config.alpha, rslora=config.rslora)
    modules = {}
    for name, factor in tensors.items():
        path, _, side = name.removesuffix(WEIGHT).rpartition(".")
        if side == "lora_A":
            modules[path] = LowRank(factor, tensors[f"{path}.lora_B{WEIGHT}"], scale)
    adapter = Adapter(
        path=directory,
        format="hf",
        modules=modules,
        base_model=portable_name(base_model),
        dropout=config.dropout,
        rslora=config.rslora,
        base_mark=base_mark,
    )
    write_adapter(adapter, directory, to="hf", dtype=dtype, force=True)


def portable_name(model: str) -> str:
    """``model`` as any working directory and PEFT find it: hub ids as they are, else the absolute
    path of the model itself (of a run directory: its ``model/``)."""
    return str(locate(model).resolve()) if Path(model).expanduser().exists() else model
