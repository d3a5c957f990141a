"""Draws from whole rows on the device are those of the sampler in NumPy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2kit import Sampling
from qwen2kit.backend.slots import DrawingLogits
from qwen2kit.engine.drawing import Block, draw
from qwen2kit.engine.request import Request
from qwen2kit.engine.sequence import start
from qwen2kit_torch.engine.device_logits import logits_on_device
from qwen2kit_torch.engine.sorted_logits import SortedLogits
from tests.unit.torch import draw_checks
from tests.unit.torch.draw_checks import KINDS, PROMPT, Make


def sorting(logits: Tensor) -> DrawingLogits:
    return SortedLogits(logits)


def on_cuda(logits: Tensor) -> DrawingLogits:
    found = logits_on_device(logits.cuda())
    assert isinstance(found, DrawingLogits)
    assert found.quick
    return found


def sorting_on_cuda(logits: Tensor) -> DrawingLogits:
    return SortedLogits(logits.cuda())


NEEDS_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
WAYS = [
    sorting,
    pytest.param(on_cuda, marks=NEEDS_GPU),
    pytest.param(sorting_on_cuda, marks=NEEDS_GPU),
]


@pytest.mark.parametrize(("grid", "scale"), [(0.0, 2.0), (0.5, 2.0), (8.0, 20.0), (0.0, 60.0)])
@pytest.mark.parametrize("make", WAYS)
def test_the_samplers_tokens(make: Make, grid: float, scale: float) -> None:
    draw_checks.check_tokens(make, grid, scale, repeats=4, steps=12)


@pytest.mark.parametrize("make", WAYS)
def test_other_dtypes(make: Make) -> None:
    draw_checks.check_unlike_dtypes(make)


@pytest.mark.parametrize("make", WAYS)
def test_shares_of_a_large_vocabulary(make: Make) -> None:
    draw_checks.check_large_vocabulary(make, 40, 151_936)


@pytest.mark.parametrize("make", WAYS)
def test_broken_rows_are_told(make: Make) -> None:
    draw_checks.check_broken(make)


def test_the_engine_draws_alike_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.from_numpy(draw_checks.logits(len(KINDS), 5000, 1, 0.0))
    called: list[int] = []
    plain, sort = logits_on_device(rows), SortedLogits(rows)
    original = sort.draw

    def counted(*given: Any) -> list[int]:
        called.append(len(given[0]))
        return original(*given)

    monkeypatch.setattr(sort, "draw", counted)

    def blocks() -> list[Block]:
        requests = [Request(tuple(PROMPT), Sampling(**kind)) for kind in KINDS]
        return [Block(start(key, each, 100)) for key, each in enumerate(requests)]

    assert not isinstance(plain, SortedLogits)
    assert draw(plain, blocks()) == draw(sort, blocks())
    assert len(called) == 1
