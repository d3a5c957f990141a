"""qwen2kit: one Qwen2 model spec, compiled to PyTorch and to MLX.

The public names below are loaded on first use, so ``import qwen2kit`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "ExecutionPlan": "qwen2kit.backend.plan",
    "LoadedModel": "qwen2kit.backend.loading",
    "ModelSpec": "qwen2kit.spec.model",
    "Qwen2KitError": "qwen2kit.errors",
    "Sampling": "qwen2kit.generate.sampling",
    "Tokenizer": "qwen2kit.tokenizer.bpe",
    "load_model": "qwen2kit.backend.loading",
    "open_checkpoint": "qwen2kit.weights.checkpoint",
    "preset": "qwen2kit.spec.presets",
}

__all__ = [
    "ExecutionPlan",
    "LoadedModel",
    "ModelSpec",
    "Qwen2KitError",
    "Sampling",
    "Tokenizer",
    "__version__",
    "load_model",
    "open_checkpoint",
    "preset",
]

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel, load_model
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.errors import Qwen2KitError
    from qwen2kit.generate.sampling import Sampling
    from qwen2kit.spec.model import ModelSpec
    from qwen2kit.spec.presets import preset
    from qwen2kit.tokenizer.bpe import Tokenizer
    from qwen2kit.weights.checkpoint import open_checkpoint


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qwen2kit' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
