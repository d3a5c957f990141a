"""Rotations, compiled or not, against float64; what a decoding step launches."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

mx = pytest.importorskip("mlx.core")

from qwen2kit.spec.model import ModelSpec, RoPESpec  # noqa: E402
from qwen2kit.spec.rope import rope_table  # noqa: E402
from qwen2kit_mlx import rotary as module  # noqa: E402
from qwen2kit_mlx.columns import Place, update  # noqa: E402
from qwen2kit_mlx.rotary import Rotary, halves  # noqa: E402
from tests.conftest import small_spec  # noqa: E402
from tests.unit.mlx.setup_mlx import YARN  # noqa: E402

VIEWS = ("Broadcast", "Reshape", "Split", "Squeeze", "Transpose", "Unflatten", "Flatten", "Slice")
Floats = NDArray[np.float64]


def rotated(spec: ModelSpec, x: Floats, anchor: Floats, positions: Any) -> tuple[Floats, Floats]:
    """``x`` ``[..., T, C]`` rotated, with what that adds to ``anchor``, in float64; and the sum of
    the magnitudes of its terms."""
    cos, sin = (t / rope_table(spec).attention_factor for t in rope_table(spec).cos_sin(positions))
    total, terms = np.zeros(x.shape), np.zeros(x.shape)
    for vector, c in ((x, cos), (anchor, cos - 1)):
        a, b = np.split(np.broadcast_to(vector, x.shape), 2, axis=-1)
        for term in (np.concatenate([a * c, b * c], -1), np.concatenate([-b * sin, a * sin], -1)):
            total += term
            terms += np.abs(term)
    return total, terms


def launches(array: mx.array) -> list[str]:
    """The operations that compute ``array``, without those that only look at memory otherwise."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    names = re.findall('label ="([^"]*)", shape=rectangle', graph.getvalue())
    return [name for name in names if name not in VIEWS]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("scaling", [None, YARN])
def test_rotation_is_exact_far_out(scaling: Any, fuse: bool) -> None:
    """Of vectors, and of vectors that stand less an anchor two hundred times as long."""
    spec = small_spec(head_dim=64, rope=RoPESpec(rope_theta=1e6, scaling=scaling))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 4, 64)).astype(np.float32)
    anchors_HC = (rng.standard_normal((2, 64)) * [[0], [200]]).astype(np.float32)
    rotary = Rotary(spec, mx.float32, fuse=fuse)
    for start in (0, 2_000, 32_000, 120_000):
        positions = np.arange(start, start + 4)
        expected, terms = rotated(spec, x, anchors_HC[:, None], positions)
        allowed = 2.0**-22 * terms
        got = rotary.at(start, 4)(mx.array(x), halves(mx.array(anchors_HC)[:, None]))
        assert (np.abs(np.array(got) - expected) <= allowed).all()
        stacked = rotary.stacked(positions[None], 2, 0)
        got = stacked(mx.array(x.transpose(0, 2, 1, 3)), halves(mx.array(anchors_HC)))
        assert (np.abs(np.array(got).transpose(0, 2, 1, 3) - expected) <= allowed).all()
        expected, _ = rotated(spec, x, np.zeros(64), positions)
        got = rotary.at(start, 4)(mx.array(x))
        assert np.abs(np.array(got) - expected).max() < 1e-6
    assert rotary.score_scale == pytest.approx(rope_table(spec).attention_factor ** 2 / 8)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("most", [1 << 15, 1])
def test_every_way_to_rotate_is_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any positions, with values that stay, by MLX's kernel or by table, as one row after the
    other; a row beside others as alone."""
    monkeypatch.setattr(module, "MOST_ROTATIONS", most)
    spec = small_spec(head_dim=16)
    x = mx.random.normal((2, 3, 5, 16)).astype(mx.float16)  # rows, tokens, heads (two are values)
    positions = np.array([[3, 4, 5], [90, 91, 92]])
    exact = Rotary(spec, mx.float32)
    rows = [exact.at(int(n[0]), 3)(r.astype(mx.float32).transpose(1, 0, 2)[None, :3])
            for n, r in zip(positions, x, strict=True)]  # fmt: skip
    expected = np.concatenate([np.array(row.transpose(0, 2, 1, 3)) for row in rows])
    for rotary, dtype, tolerance in (
        (exact, mx.float32, 0),
        (Rotary(spec, mx.float32, fuse=True), mx.float32, 1e-6),
        (Rotary(spec, mx.float16), mx.float16, 4e-3),
    ):
        values = x.astype(dtype)
        stacked = np.array(rotary.stacked(positions, 3, 2)(values).astype(mx.float32))
        assert np.abs(stacked[:, :, :3] - expected).max() <= tolerance
        assert np.array_equal(stacked[:, :, 3:], np.array(values[:, :, 3:].astype(mx.float32)))
        alone = rotary.stacked(positions[1:], 3, 2)(values[1:]).astype(mx.float32)
        assert np.array_equal(np.array(alone), stacked[1:])
        flat = values.reshape(1, 6, 5, 16).transpose(0, 2, 1, 3)[:, :3]
        scattered = rotary.scattered(positions.reshape(-1))(flat).transpose(0, 2, 1, 3)
        got = np.array(scattered.astype(mx.float32)).reshape(2, 3, 3, 16)
        assert np.abs(got - expected).max() <= tolerance


def test_a_compiled_rotation_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors included; and it is traced once, not for every number of rows or tokens."""
    plain, traced = module._turned, []

    def counted(*given: mx.array) -> mx.array:
        traced.append(given)
        return plain(*given)

    monkeypatch.setattr(module, "_turned", counted)
    rotary = Rotary(small_spec(head_dim=16), mx.float32, fuse=True)
    anchor = halves(mx.zeros((5, 16)))
    mx.eval(anchor)
    for rows, count in ((1, 1), (1, 7), (8, 1), (3, 2)):
        x = mx.zeros((rows, count, 80))
        mx.eval(x)
        rotation = rotary.stacked(np.arange(count) + np.arange(rows)[:, None], 3, 2)
        turned = rotation(x.reshape(rows, count, 5, 16), anchor)
        tables, kernel = launches(turned)
        assert tables == "Concatenate", "by head, once for all layers"
        assert kernel.startswith("Compiled")
        assert turned.shape == (rows, count, 5, 16)
    assert len(traced) == 2, "the sum and the one within it"


def test_unequal_rows_are_written_by_one_kernel() -> None:
    place = Place.at(1, [3, 5, 2], count=1, heads=2)
    stored, new = mx.zeros((2, 5, 2, 10, 8)), mx.random.normal((3, 1, 2, 2, 8))
    mx.eval(stored, new, place.index)
    update(stored, place, new)
    assert launches(stored) == ["Scatter"]
    expected = np.zeros((2, 5, 2, 10, 8), dtype=np.float32)
    for row, column in enumerate((3, 5, 2)):
        expected[:, 1 + row, :, column] = np.array(new[row, 0])
    assert np.array_equal(np.array(stored), expected)
    assert np.array_equal(np.array(place.columns), [[3], [5], [2]])
