"""What quantising costs: perplexity, KL divergence and agreement with the original on a text."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import exp, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.registry import get
from qwen2kit.parity.logit_files import LogitFiles
from qwen2kit.parity.metrics import compare_logits, merge_deltas, negative_log_likelihood
from qwen2kit.parity.prompts import Prompt
from qwen2kit.spec.counts import count_params
from qwen2kit.weights.checkpoint import Checkpoint

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelQuality:
    """One model on the text.

    Attributes:
        bytes: size of its weight files.
        bits_per_weight: ``8 * bytes`` per parameter.
        perplexity: exp of the mean negative log-likelihood per predicted token.
        kl: KL(original || this) in nats, mean over positions; 0 for the original.
        top1_agreement: fraction of positions whose most likely token is the original's.
    """

    bytes: int
    bits_per_weight: float
    perplexity: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """A conversion beside its source.

    Attributes:
        text: ``auto`` or the file.
        tokens: positions that were compared.
        backend, dtype: what computed both.
        original, converted: the two models.
    """

    text: str
    tokens: int
    backend: str
    dtype: str
    original: ModelQuality
    converted: ModelQuality

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an infinite perplexity or divergence becomes None."""
        values = asdict(self)
        for side in ("original", "converted"):
            values[side] = {
                key: value if isfinite(value) else None for key, value in values[side].items()
            }
        return values


class Yardstick:
    """An original model's logits on a text, against which others are measured.

    One model is in memory at a time; logits wait in ``folder`` (4 bytes per position and id).

    Args:
        original: the checkpoint.
        windows: the text (`held_out`).
        folder: an existing, empty folder.
        backend: what computes the logits of every model, on its best device: in float32 on a CPU,
            in bfloat16 elsewhere.
        progress: called with what is being done.

    Raises:
        Qwen2KitError: the backend is absent or cannot load or run the model.
    """

    def __init__(
        self,
        original: Checkpoint,
        windows: Sequence[Prompt],
        folder: Path,
        *,
        backend: str = "auto",
        progress: Progress = lambda message: None,
    ) -> None:
        self._windows, self._folder, self._progress = windows, folder, progress
        self._backend = get(backend)
        self.backend = self._backend.name
        self.dtype = "float32" if self._backend.devices()[0].name == "cpu" else "bfloat16"
        self._files = self._run(original, folder / "original")
        self.original = self._judge(original, self._files)

    def measure(self, other: Checkpoint) -> ModelQuality:
        """Perplexity of ``other`` and its distance from the original."""
        with TemporaryDirectory(dir=self._folder) as folder:
            return self._judge(other, self._run(other, Path(folder) / "converted"))

    def _run(self, checkpoint: Checkpoint, folder: Path) -> LogitFiles:
        files = LogitFiles(folder)
        model = self._backend.compile(checkpoint.spec, ExecutionPlan(dtype=self.dtype))
        model.load(checkpoint.weights)
        for window in self._windows:
            self._progress(f"{checkpoint.path.name} on {self.backend}: {window.name}")
            files.save(window.name, model.logits(window.tokens))
        del model
        gc.collect()
        return files

    def _judge(self, checkpoint: Checkpoint, files: LogitFiles) -> ModelQuality:
        deltas, surprise, predicted = [], 0.0, 0
        for window in self._windows:
            logits = files.load(window.name)
            deltas.append(compare_logits(self._files.load(window.name), logits))
            surprise += negative_log_likelihood(logits, window.tokens)
            predicted += len(window.tokens) - 1
        total = merge_deltas(deltas)
        size = _weight_bytes(checkpoint.path)
        return ModelQuality(
            bytes=size,
            bits_per_weight=8 * size / count_params(checkpoint.spec).total,
            perplexity=_exp(surprise / predicted),
            kl=total.kl,
            top1_agreement=total.top1_agreement,
        )


def measure_quality(
    original: Checkpoint,
    converted: Checkpoint,
    windows: Sequence[Prompt],
    *,
    text: str,
    progress: Progress = lambda message: None,
) -> QualityReport:
    """Both models on ``windows``, one after the other, in the backend's default dtype.

    Raises:
        Qwen2KitError: the backend is absent or cannot load or run a model.
    """
    with TemporaryDirectory(prefix="qwen2kit-quality-") as folder:
        yardstick = Yardstick(original, windows, Path(folder), progress=progress)
        return QualityReport(
            text=text,
            tokens=sum(len(window.tokens) for window in windows),
            converted=yardstick.measure(converted),
            original=yardstick.original,
            backend=yardstick.backend,
            dtype=yardstick.dtype,
        )


def _weight_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _exp(value: float) -> float:
    return exp(value) if value < 700 else float("inf")
