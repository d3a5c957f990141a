"""Adapters small enough to write in a moment, without any framework."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen2kit.adapters.lora import Adapter, LowRank, adaptable
from qwen2kit.spec.model import ModelSpec
from qwen2kit.weights.tensor import from_float32

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(
    spec: ModelSpec,
    *,
    rank: int = 4,
    scale: float = 2.0,
    targets: Sequence[str] = TARGETS,
    seed: int = 3,
    size: float = 0.05,
    base_model: str | None = None,
) -> Adapter:
    """Random A and B of every matrix whose last name is among ``targets``."""
    rng = np.random.default_rng(seed)

    def factor(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * size).astype(np.float32)

    modules = {
        path: LowRank(
            from_float32(factor(rank, inputs), "float32"),
            from_float32(factor(outputs, rank), "float32"),
            scale,
        )
        for path, (outputs, inputs) in adaptable(spec)
        if path.rpartition(".")[2] in targets
    }
    return Adapter(path=Path("memory"), format="hf", modules=modules, base_model=base_model)
