"""Every layout of processes gives the single process's losses, gradient norms and weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.plan.degrees import Degrees
from tests.parallel.curves import Case, batch_of, fresh, spec_of, train
from tests.parallel.workers import run_on

pytest.importorskip("torch")


# What is wrong in a step shows in the next one; layouts by themselves go on for all `curves.STEPS`.
FEW = 8


@cache
def alone(tied: bool, packed: bool, window: int | None, steps: int, layers: int = 4) -> Any:
    return train(Case(tied=tied, packed=packed, window=window, steps=steps, layers=layers))


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
    kind = (case.tied, case.packed, case.window, case.steps, case.layers)
    expected, held_out, weights = alone(*kind)
    for curve, held, exported in run_on(case.degrees.world, train, folder, case):
        np.testing.assert_allclose(curve, expected, rtol=1e-5)
        np.testing.assert_allclose(held, held_out, rtol=1e-5)
        assert exported.keys() == weights.keys()
        for name, values in weights.items():
            # Not element by element: Adam turns a gradient that is zero but for rounding into a
            # whole step.
            assert np.linalg.norm(exported[name] - values) < 1e-4 * np.linalg.norm(values), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_and_tied(name: str, tmp_path: Path) -> None:
    check(replace(smallest(LAYOUTS[name]), tied=True, packed=True), tmp_path)


def smallest(degrees: Degrees) -> Case:
    """A case with as many layers and micro-batches as are told apart: every one takes each process
    half a second."""
    replicas = degrees.dp_replicate * degrees.dp_shard
    several = sum(degree > 1 for degree in (replicas, degrees.tp, degrees.cp, degrees.pp)) > 1
    halves = {"micro_batch_rows": 4} if replicas == degrees.pp == 1 else {}
    return Case(degrees=degrees, layers=2 if several else 4, plan=halves)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("fsdp2-tp2", Case(packed=True)),
        ("pp2-tp2", Case()),
        ("cp2-tp2-pp2", Case(window=9)),
        ("fsdp2-cp2", Case(tied=True, packed=True, window=9)),
        ("fsdp2-tp2", Case(tied=True, packed=True, plan={"recompute": "full"})),
        ("fsdp2-pp2", Case(packed=True, plan={"recompute": "selective"})),
        ("tp2", Case(tied=True, packed=True, layers=2, plan={"compile": True})),
        # Joint products, fused norms and operators, computed again under FSDP.
        ("fsdp2", Case(packed=True, plan={"compile": True, "recompute": "selective"})),
        ("fsdp2-cp2", Case(tied=True, packed=True, layers=2, plan={"compile": True})),
    ],
)
def test_other_models_and_plans(name: str, case: Case, tmp_path: Path) -> None:
    check(replace(case, degrees=LAYOUTS[name], steps=FEW), tmp_path)


@pytest.mark.parametrize(
    ("saved", "restored"),
    [
        (Degrees(dp_shard=2), Degrees()),
        (Degrees(), Degrees(dp_shard=4)),
        (Degrees(dp_shard=2, tp=2), Degrees(pp=2, cp=2)),
        (Degrees(pp=2, tp=2), Degrees(dp_shard=2)),
        (Degrees(dp_replicate=2, dp_shard=2), Degrees(dp_replicate=2, dp_shard=2)),
    ],
    ids=lambda degrees: degrees.describe(),
)
def test_a_checkpoint_continues_on_another_layout(
    saved: Degrees, restored: Degrees, tmp_path: Path
) -> None:
    before = Case(degrees=saved, tied=True, packed=True, steps=FEW // 2)
    after = Case(degrees=restored, tied=True, packed=True, steps=FEW // 2)
    state, stores = tmp_path / "state", tmp_path / "stores"
    state.mkdir()
    stores.mkdir()
    first = run_on(saved.world, train, stores, before, state)[0][0]
    second = run_on(restored.world, train, stores, after, None, state, FEW // 2)[0][0]
    expected, _, _ = alone(True, True, None, FEW)
    np.testing.assert_allclose(first + second, expected, rtol=1e-5)


def test_resuming_on_the_same_layout_is_bit_identical(tmp_path: Path) -> None:
    degrees = Degrees(dp_shard=2, tp=2)
    state, stores = tmp_path / "state", tmp_path / "stores"
    state.mkdir()
    stores.mkdir()
    whole = run_on(4, train, stores, Case(degrees=degrees, tied=True, steps=5))[0]
    run_on(4, train, stores, Case(degrees=degrees, tied=True, steps=3), state)
    rest = run_on(4, train, stores, Case(degrees=degrees, tied=True, steps=2), None, state, 3)[0]
    assert rest[0] == whole[0][3:]
    assert all((rest[2][name] == values).all() for name, values in whole[2].items())


@pytest.mark.parametrize("name", ["fsdp2-tp2", "pp2-tp2", "fsdp2-cp2"])
def test_fresh_weights_do_not_depend_on_the_layout(name: str, tmp_path: Path) -> None:
    expected = fresh(Case(), 7)
    degrees = LAYOUTS[name]
    for weights in run_on(degrees.world, fresh, tmp_path, Case(degrees=degrees), 7):
        assert weights.keys() == expected.keys()
        assert all((weights[key] == values).all() for key, values in expected.items())


@pytest.mark.parametrize("name", ["fsdp2", "tp2", "cp2", "pp2"])
def test_a_single_step_is_the_reference_gradient_too(name: str, tmp_path: Path) -> None:
    """Losses against the NumPy reference, which knows of no processes."""
    from qwen2kit.backend.conformance.training_batches import reference_loss
    from qwen2kit.spec.reference import ReferenceModel
    from tests.conftest import random_weights

    case = Case(degrees=LAYOUTS[name], packed=True, steps=1)
    spec = spec_of(case)
    reference = ReferenceModel(spec, random_weights(spec))
    curve, _, _ = run_on(case.degrees.world, train, tmp_path, case)[0]
    assert curve[0][0] == pytest.approx(reference_loss(reference, batch_of(case, 0)), rel=1e-5)
