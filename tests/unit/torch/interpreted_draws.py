"""The kernels that draw, run by Triton's interpreter (`test_torch_interpreted`)."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from qwen2kit_torch.engine.drawn_logits import DrawnLogits
from tests.unit.torch import draw_checks


@pytest.mark.parametrize(("grid", "scale"), [(0.0, 2.0), (8.0, 20.0), (0.0, 60.0)])
def test_the_samplers_tokens(grid: float, scale: float) -> None:
    draw_checks.check_tokens(DrawnLogits, grid, scale, repeats=1, steps=3)


def test_other_dtypes() -> None:
    draw_checks.check_unlike_dtypes(DrawnLogits)


def test_rows_of_several_parts() -> None:
    draw_checks.check_large_vocabulary(DrawnLogits, 3, 9000)


def test_broken_rows_are_told() -> None:
    draw_checks.check_broken(DrawnLogits)
