"""mlx-lm as a parity peer: its own loader, its own model, its own ``generate_step``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qwen2kit.backend.protocol import TokenIds
from qwen2kit.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class MLXLMPeer:
    """Loads MLX and Hugging Face directories through ``mlx_lm.utils.load_model``."""

    name = "mlx-lm"

    def refuses(self, checkpoint: Checkpoint, dtype: str) -> str:
        """Not installed, or not a directory."""
        if find_spec("mlx") is None or find_spec("mlx_lm") is None:
            return "not installed; pip install mlx-lm 'qwen2kit[mlx]'"
        if checkpoint.format == "gguf":
            return (
                "reads MLX and Hugging Face directories, not GGUF; "
                "convert with: qwen2kit convert MODEL --to mlx"
            )
        if checkpoint.packing is not None:
            return (
                "does not read GPTQ, and rounds AWQ's zero points to float16; "
                "convert with: qwen2kit convert MODEL --to mlx"
            )
        return ""

    def load(self, checkpoint: Checkpoint, dtype: str) -> LoadedMLXLM:
        """Load the directory and cast floating-point parameters to ``dtype``."""
        return LoadedMLXLM(checkpoint, dtype)


class LoadedMLXLM:
    """An mlx-lm model as a `Peer`."""

    name = "mlx-lm"

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        import mlx.core as mx

        model, _ = import_module("mlx_lm.utils").load_model(checkpoint.path)
        model.set_dtype(getattr(mx, dtype))
        mx.eval(model.parameters())
        self._model: Any = model

    def logits(self, tokens: TokenIds) -> NDArray[np.float32]:
        """``[T, vocab]`` float32."""
        import mlx.core as mx
        import numpy as np

        logits = self._model(mx.array([list(tokens)]))[0].astype(mx.float32)
        return np.array(logits)

    def greedy(self, tokens: TokenIds, count: int, stop: Sequence[int]) -> list[int]:
        """mlx-lm's own cached decoding; stopping is the caller's business there."""
        import mlx.core as mx

        step = import_module("mlx_lm.generate").generate_step
        output: list[int] = []
        for token, _ in step(mx.array(list(tokens)), self._model, max_tokens=count):
            output.append(int(token))
            if output[-1] in stop:
                break
        return output

    def hidden_states(self, tokens: TokenIds) -> NDArray[np.float32] | None:
        """mlx-lm has no way to show them."""
        return None
