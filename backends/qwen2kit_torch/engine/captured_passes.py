"""Passes over prompts as CUDA graphs: of a small model, launching takes longer than computing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qwen2kit.backend.slots import Feed
from qwen2kit.spec.model import ModelSpec
from qwen2kit_torch.engine.captures import Captures, run_aside
from qwen2kit_torch.engine.joined import JoinedWeights
from qwen2kit_torch.engine.layers import Buffers, packed
from qwen2kit_torch.engine.packed_products import EXPANDED
from qwen2kit_torch.engine.pieces import TOKENS_PER_PASS
from qwen2kit_torch.engine.prompts import PassSize, PromptPass, Workspace
from qwen2kit_torch.engine.storage import Storage
from qwen2kit_torch.engine.tuning import pass_rows, power_of_two
from qwen2kit_torch.rope import Rope

_LEAST_SINGLES, _MOST_SINGLES = 16, 256
_BUFFER_BYTES = 128 << 20


class CapturedPasses:
    """Passes of every size that fits into 128 MiB of buffers, which they share.

    Args:
        spec, weights, storage, rope: as for `PromptPass`.
        captures: makes the graphs.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: JoinedWeights,
        storage: Storage,
        rope: Rope,
        captures: Captures,
    ) -> None:
        self._model = spec, weights, storage, rope
        self._captures = captures
        self._singles = min(_MOST_SINGLES, power_of_two(max(_LEAST_SINGLES, storage.count)))
        self._most = _most_rows(Buffers.row_bytes(spec, weights), self._singles)
        if packed(weights):  # a graph would keep the memory into which matrices are expanded
            self._most = min(self._most, EXPANDED)
        self._workspace: Workspace | None = None
        self._passes: dict[int, CapturedPass] = {}

    def run(
        self, feeds: Sequence[Feed], long: Sequence[int], short: Sequence[int]
    ) -> Tensor | None:
        """Logits of the wanted positions ``[N, V]``, feed by feed; None if these are too many.

        Args:
            feeds: of one pass.
            long, short: which of them are pieces of prompts, and which are taken token by token.
        """
        rows = sum(len(feed.tokens) for feed in feeds)
        singles = sum(len(feeds[index].tokens) for index in short)
        wanted = sum(feed.wanted for feed in feeds)
        if rows > self._most or max(singles, wanted) > self._singles:
            return None
        found = self._of(pass_rows(rows))
        found.step.set(feeds, [*short, *long], len(short))
        found.run()
        return found.step.logits[:wanted].clone()

    def prepare(self) -> None:
        """Capture all sizes."""
        rows = pass_rows(1)
        while rows <= self._most:
            self._of(rows).prepare()
            rows = pass_rows(rows + 1)

    def close(self) -> None:
        """Give the memory back."""
        self._passes.clear()
        self._workspace = None

    def _of(self, rows: int) -> CapturedPass:
        if rows not in self._passes:
            spec, weights, storage, rope = self._model
            size = self._size(self._most)
            self._workspace = self._workspace or Workspace.of(spec, weights, storage, size)
            step = PromptPass(
                spec, weights, storage, rope, self._size(rows), workspace=self._workspace
            )
            self._passes[rows] = CapturedPass(step, self._captures)
        return self._passes[rows]

    def _size(self, rows: int) -> PassSize:
        pieces = min(self._model[2].count, rows)
        return PassSize(rows, pieces, min(self._singles, rows), self._singles)


class CapturedPass:
    """A `PromptPass` that runs as it is the first time, and as a CUDA graph from then on."""

    def __init__(self, step: PromptPass, captures: Captures) -> None:
        self.step = step
        self._captures = captures
        self._ran = False
        self._graph: Any = None

    def run(self) -> None:
        """Queue the pass."""
        if not self._ran:
            self.step.run()
            self._ran = True
            return
        if self._graph is None:
            self._graph = self._captures(self.step.run)
        self._graph.replay()

    def prepare(self) -> None:
        """Capture it."""
        if self._graph is None:
            self.step.set([])
            run_aside(self.step.run)
            self._ran = True
            self._graph = self._captures(self.step.run)


def _most_rows(row_bytes: int, singles: int) -> int:
    """The largest size of a pass."""
    fitting = min(pass_rows(TOKENS_PER_PASS + singles), _BUFFER_BYTES // row_bytes)
    return next((rows for rows in range(fitting, 0, -1) if pass_rows(rows) == rows), 0)
