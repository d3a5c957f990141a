"""Two GPUs and NCCL give the losses, gradient norms and weights of one GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen2kit.plan.degrees import Degrees
from tests.parallel.curves import Case, train_on
from tests.parallel.workers import run_on

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

LAYOUTS = {
    "fsdp2": Degrees(dp_shard=2),
    "replicas2": Degrees(dp_replicate=2),
    "tp2": Degrees(tp=2),
    "cp2": Degrees(cp=2),
    "pp2": Degrees(pp=2),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_one_gpu(name: str, compiled: bool, tmp_path: Path) -> None:
    case = Case(tied=True, packed=True, plan={"compile": compiled})
    expected, held_out, weights = train_on(case, "cuda", "float32")
    laid_out = replace(case, degrees=LAYOUTS[name])
    for curve, held, exported in run_on(
        2, train_on, tmp_path, laid_out, "cuda", "float32", gpus=True
    ):
        off = np.abs(np.array(curve) / np.array(expected) - 1).max(axis=0)
        print(f"{name}: largest relative difference of loss {off[0]:.1e}, norm {off[1]:.1e}")
        np.testing.assert_allclose(curve, expected, rtol=1e-5)
        np.testing.assert_allclose(held, held_out, rtol=1e-5)
        for tensor, values in weights.items():
            assert np.linalg.norm(exported[tensor] - values) < 1e-4 * np.linalg.norm(values), tensor
