"""Drawing's view of logits that stay on the device, against NumPy's of the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit.backend.slots import BROKEN, Edit  # noqa: E402
from qwen2kit.engine.host_logits import HostLogits  # noqa: E402
from qwen2kit_mlx.device_logits import DeviceLogits  # noqa: E402
from qwen2kit_mlx.kernels import NativeKernels  # noqa: E402

VOCAB = 1000
RNG = np.random.default_rng(4)


class Head:
    """A decoder whose residual stream is the logits already."""

    kernels = NativeKernels(fuse=False)

    def __init__(self, spec: object = None) -> None:
        self.spec = type("Spec", (), {"vocab_size": VOCAB})()

    def logits(self, x: mx.array) -> mx.array:
        return x


def both(rows: np.ndarray, dtype: mx.Dtype = mx.float32) -> tuple[DeviceLogits, HostLogits]:
    stored = mx.array(rows).astype(dtype)
    wide = np.array(stored.astype(mx.float32))
    return DeviceLogits(Head(), stored, mx.Device(mx.cpu)), HostLogits(wide)  # type: ignore[arg-type]


def some_edit(kind: int) -> Edit:
    count = int(RNG.integers(1, 60))
    ids = RNG.choice(VOCAB, count, replace=False).astype(np.int64)
    words = RNG.integers(0, 1 << 32, -(-VOCAB // 32), dtype=np.uint32)
    return (
        Edit(),
        Edit(limit=700, temperature=0.7),
        Edit(ids=ids, scale=np.full(count, 1.3, np.float32), temperature=1.5),
        Edit(ids=ids, shift=RNG.normal(0, 5, count).astype(np.float32), limit=900),
        Edit(
            ids=ids,
            scale=np.full(count, 0.8, np.float32),
            shift=np.full(count, -1.0, np.float32),
            allowed=words,
            temperature=0.0,
        ),
        Edit(allowed=words, limit=500),
        Edit(ids=ids[:1], shift=np.array([-np.inf], np.float32)),
        Edit(ids=np.zeros(0, np.int64)),
    )[kind]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [8, 300])
def test_shortlists_are_numpys(dtype: str, rows: int) -> None:
    """Every kind of edit in one batch, in one slice of rows and in several."""
    values = RNG.normal(0, 4, (rows, VOCAB)).astype(np.float32)
    ours, numpys = both(values, getattr(mx, dtype))
    edits = [some_edit(row % 8) for row in range(rows)]
    for size in (1, 40, VOCAB, 5 * VOCAB):
        got, expected = ours.shortlist(size, edits), numpys.shortlist(size, edits)
        np.testing.assert_allclose(got.scores, expected.scores, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(got.total, expected.total, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(got.raw_total, expected.raw_total, rtol=1e-6, atol=1e-5)
        inside = np.isfinite(expected.scores)
        gaps = -np.diff(np.where(inside, expected.scores, -1e9))
        distinct = inside.copy()
        distinct[:, :-1] &= gaps > 1e-4
        distinct[:, 1:] &= gaps > 1e-4
        distinct[:, -1] &= size >= VOCAB  # its equal may have been left out
        assert np.array_equal(got.ids[distinct], expected.ids[distinct])
        assert np.array_equal(got.raw[distinct], expected.raw[distinct])
        assert got.ids.dtype == np.int64
        assert got.total.dtype == np.float64
        assert all(len(set(row)) == len(row) for row in got.ids.tolist())


def test_equal_scores_go_by_id() -> None:
    values = RNG.integers(0, 3, (4, VOCAB)).astype(np.float32)
    ours, numpys = both(values)
    assert ours.greedy(None) == numpys.greedy(None)
    got = ours.shortlist(VOCAB, [Edit()] * 4)
    assert np.array_equal(got.ids, numpys.shortlist(VOCAB, [Edit()] * 4).ids)


@pytest.mark.parametrize("rows", [3, 300])
def test_greedy_and_rows(rows: int) -> None:
    values = RNG.normal(0, 4, (rows, VOCAB)).astype(np.float32)
    ours, numpys = both(values)
    for limit in (None, 700):
        assert ours.greedy(limit) == numpys.greedy(limit)
    chosen = [rows - 1, 0, 1]
    assert np.array_equal(ours.rows(chosen), values[chosen])
    assert ours.rows([]).shape == (0, VOCAB)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_rows_are_told(value: float) -> None:
    values = RNG.normal(0, 4, (3, VOCAB)).astype(np.float32)
    values[1, 40] = value
    for logits in both(values):
        assert [token == BROKEN for token in logits.greedy(None)] == [False, True, False]
        assert BROKEN not in logits.greedy(40)  # what is beyond the limit does not count
        for size in (5, VOCAB):
            assert logits.shortlist(size, [Edit()] * 3).sound == [True, False, True]
    for logits in both(np.full((3, VOCAB), -np.inf, np.float32)):
        assert logits.greedy(None) == [BROKEN] * 3
        assert logits.shortlist(5, [Edit()] * 3).sound == [False] * 3
    nothing = Edit(allowed=np.zeros(-(-VOCAB // 32), np.uint32))
    for logits in both(np.abs(np.nan_to_num(values, posinf=1.0))):
        assert logits.shortlist(5, [nothing, Edit(), nothing]).sound == [False, True, False]
