"""Which of several exit codes says why a run failed."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ([6, 1], 6),  # one gave up, one noticed
        ([1, 6], 6),
        ([-15, 6], 6),  # ended by the launcher
        ([-9, 6], 6),  # ended by the launcher, the hard way
        ([1, -9], -9),  # one was killed, one noticed
        ([-15, -9], -9),
        ([-11, -9], -11),  # a crash
        ([1, 1], 1),
        ([-15, 1], 1),
    ],
)
def test_the_cause_is_told_from_its_consequences(codes: list[int], cause: int) -> None:
    from qwen2kit_torch.parallel.launch import root_cause

    assert root_cause(codes) == cause
