"""Fixtures shared by all tests: specs small enough to compute, random weights, the real model."""

from __future__ import annotations

import os
from pathlib import Path

# Tests keep every core busy with processes; more threads would only be in their way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from qwen2kit.spec.model import ModelSpec, RoPESpec, SlidingWindowSpec
from qwen2kit.spec.schema import schema
from qwen2kit.weights.source import MemorySource
from qwen2kit.weights.tensor import from_float32

REAL_MODEL = Path(
    os.environ.get(
        "QWEN2KIT_REAL_MODEL",
        Path.home() / ".cache/qwen2kit-real-model/qwen2.5-coder-0.5b-instruct.gguf",
    )
)


def small_spec(*, tied: bool = True, **changes: object) -> ModelSpec:
    """A dense spec of about 100k parameters with grouped heads and an odd vocabulary."""
    values: dict[str, object] = {
        "vocab_size": 199,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 256,
        "rope": RoPESpec(rope_theta=10_000.0),
        "window": SlidingWindowSpec(max_window_layers=3),
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


def random_weights(spec: ModelSpec, seed: int = 0, scale: float = 0.1) -> MemorySource:
    """Float32 weights, large enough that a wrong bias, norm or rotation shows."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for param in schema(spec):
        values = rng.standard_normal(param.shape).astype(np.float32) * scale
        if param.kind == "norm":
            values += 1
        tensors[param.name] = from_float32(values, "float32")
    return MemorySource(tensors)


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The genuine 0.5B checkpoint (GGUF), or a skip."""
    if not REAL_MODEL.is_file():
        pytest.skip(f"real model absent: set QWEN2KIT_REAL_MODEL (looked at {REAL_MODEL})")
    return REAL_MODEL


@pytest.fixture(scope="session")
def datasets_dir() -> Path:
    """Benchmark data in Hub layout, or a skip."""
    path = Path(os.environ.get("QWEN2KIT_DATASETS", Path(__file__).parents[2] / "shared/datasets"))
    if not path.is_dir():
        pytest.skip(f"benchmark data absent: set QWEN2KIT_DATASETS (looked at {path})")
    return path
