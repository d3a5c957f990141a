"""Every layout of processes gives the single process's losses, gradient norms and weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.plan.degrees import Degrees
from tests.parallel.curves import Case, train
from tests.parallel.workers import run_on

pytest.importorskip("torch")


@cache
def alone(tied: bool, packed: bool, window: int | None) -> Any:
    return train(Case(tied=tied, packed=packed, window=window))


LAYOUTS = {
    "fsdp2": Degrees(dp_shard=2),
    "hsdp2x2": Degrees(dp_replicate=2, dp_shard=2),
    "replicas2": Degrees(dp_replicate=2),
    "tp2": Degrees(tp=2),
    "cp2": Degrees(cp=2),
    "cp4": Degrees(cp=4),
    "pp2": Degrees(pp=2),
    "pp4": Degrees(pp=4),
    "pp2-gpipe": Degrees(pp=2, schedule="gpipe"),
    "fsdp2-tp2": Degrees(dp_shard=2, tp=2),
    "fsdp2-cp2": Degrees(dp_shard=2, cp=2),
    "fsdp2-pp2": Degrees(dp_shard=2, pp=2),
    "cp2-tp2": Degrees(cp=2, tp=2),
    "pp2-tp2": Degrees(pp=2, tp=2),
    "pp2-cp2": Degrees(pp=2, cp=2),
    "fsdp2-tp2-pp2": Degrees(dp_shard=2, tp=2, pp=2),
    "cp2-tp2-pp2": Degrees(cp=2, tp=2, pp=2),
    "hsdp2x2-tp2": Degrees(dp_replicate=2, dp_shard=2, tp=2),
}


def check(case: Case, folder: Path) -> None:
    expected, held_out, weights = alone(case.tied, case.packed, case.window)
    for curve, held, exported in run_on(case.degrees.world, train, folder, case):
        np.testing.assert_allclose(curve, expected, rtol=1e-5)
        np.testing.assert_allclose(held, held_out, rtol=1e-5)
        assert exported.keys() == weights.keys()
        for name, values in weights.items():
            np.testing.assert_allclose(exported[name], values, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_and_tied(name: str, tmp_path: Path) -> None:
    check(Case(degrees=LAYOUTS[name], tied=True, packed=True), tmp_path)
