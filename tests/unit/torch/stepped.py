"""The decoding step without any graph, so that Triton's interpreter can run it on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")


class Stepped:
    """Slots whose single tokens go through a `Step`, run without any graph.

    Args:
        model: loaded in float32.
        count, capacity: of the slots.
        rows: of the step.
        anchored: whether keys stand less their bias, as in float32, or have it, as in 16 bits.
        draws: whether the step draws.
    """

    def __init__(
        self,
        model: Any,
        count: int,
        capacity: int,
        rows: int,
        *,
        anchored: bool = True,
        draws: bool = False,
    ) -> None:
        from qwen2kit_torch.engine.draws import Scratch
        from qwen2kit_torch.engine.eager import EagerSlots
        from qwen2kit_torch.engine.joined import join
        from qwen2kit_torch.engine.step import Step

        for module in model.module.modules():
            if hasattr(module, "anchored"):
                module.anchored = anchored
        self.eager = EagerSlots(model.module, count=count, capacity=capacity)
        rope = model.module.rope(capacity, torch.device("cpu"), torch.float32)
        scratch = Scratch(rows, model.spec.vocab_size, torch.device("cpu"), said=True)
        self.step = Step(
            model.spec,
            join(model.module),
            self.eager._storage,
            rows,
            rope,
            early=False,
            scratch=scratch if draws else None,
        )
        self.step.limit.fill_(model.spec.vocab_size)

    @torch.inference_mode()
    def run(self, rows: Sequence[tuple[int, int, int]]) -> Any:
        """Logits of rows (token, slot, position); others are padding."""
        padding = [(0, -1, 0)] * (self.step.rows.shape[1] - len(rows))
        self.step.rows.copy_(torch.tensor([*rows, *padding], dtype=torch.int32).T)
        self.step.run()
        return self.step.logits[: len(rows)].numpy().copy()
