"""Logits of one model in files, so that two models are compared with one of them in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class LogitFiles:
    """Logit arrays by the name of their text, under a folder that must not exist yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def save(self, name: str, logits: NDArray[np.float32]) -> None:
        """Store logits ``[T, vocab]`` float32."""
        import numpy as np

        np.save(self._file(name), logits)

    def load(self, name: str) -> NDArray[np.float32]:
        """The stored logits, memory-mapped and read-only."""
        import numpy as np

        mapped: NDArray[np.float32] = np.load(self._file(name), mmap_mode="r")
        return mapped

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.npy"
