"""Work on a GPU recorded once and launched as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Captures:
    """Makes CUDA graphs that share memory; so no two of them may run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of ``work``, which has run before (that compiles its kernels)."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self._pool = graph.pool()
        return graph


def run_aside(work: Callable[[], None]) -> None:
    """Run ``work`` on a stream of its own, between what came before and what comes after."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
