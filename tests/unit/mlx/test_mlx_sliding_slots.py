"""Layers with a sliding window keep the window and no more, and nobody notices."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit.backend.slots import Feed  # noqa: E402
from qwen2kit.engine.generate import generate  # noqa: E402
from qwen2kit.engine.recompute import RecomputingSlots  # noqa: E402
from qwen2kit.errors import BackendError  # noqa: E402
from qwen2kit.generate.sampling import Sampling  # noqa: E402
from qwen2kit.spec.model import SlidingWindowSpec  # noqa: E402
from qwen2kit_mlx.slot_store import SlotStore  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.unit.mlx.setup_mlx import KERNELS, model  # noqa: E402

RNG = np.random.default_rng(12)
MIXED = small_spec(
    num_hidden_layers=3,
    window=SlidingWindowSpec(enabled=True, sliding_window=7, max_window_layers=1),
)
ALL = small_spec(window=SlidingWindowSpec(enabled=True, sliding_window=7, max_window_layers=0))
SPECS = {"mixed": MIXED, "all": ALL}


def ids(count: int) -> tuple[int, ...]:
    return tuple(RNG.integers(0, 199, count).tolist())


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2kit_mlx.slot_store.BLOCK", 8)
    monkeypatch.setattr("qwen2kit_mlx.slot_store.SPARE", 3)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", SPECS)
def test_random_schedules_equal_whole_passes(
    name: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, decoding, cuts near and far, copies, reuse of slots: far beyond the window."""
    monkeypatch.setattr("qwen2kit_mlx.passes.PREFILL_TOKENS", 20)
    monkeypatch.setattr("qwen2kit_mlx.passes.SHORT", 4)
    spec = SPECS[name]
    ours = model(spec, random_weights(spec), kernels)
    slots, plain = ours.slots(3, 120), RecomputingSlots(ours, 3, 120)
    length = [0, 0, 0]
    for step in range(40):
        if step % 9 == 8:
            source, target = RNG.permutation(3)[:2].tolist()
            keep = int(RNG.integers(0, length[source] + 1))
            if keep:
                slots.copy(source, target, keep)
                plain.copy(source, target, keep)
                length[target] = keep
        feeds = []
        for slot in RNG.permutation(3)[: RNG.integers(1, 4)].tolist():
            back = int(RNG.choice([0, 0, 0, 1, 3, 30, 200]))
            start = max(0, length[slot] - back)
            count = min(int(RNG.choice([1, 1, 1, 3, 12, 30])), 120 - start)
            if count > 0:
                feeds.append(Feed(slot, start, ids(count)))
                length[slot] = start + count
        if not feeds:
            length = [0, 0, 0]
            continue
        rows = range(len(feeds))
        got, expected = slots.feed(feeds).rows(rows), plain.feed(feeds).rows(rows)
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-4)


def test_greedy_runs_over_the_edge() -> None:
    ours = model(MIXED, random_weights(MIXED))
    slots, plain = ours.slots(2, 100), RecomputingSlots(ours, 2, 100)
    prompts = [Feed(0, 0, ids(50)), Feed(1, 0, ids(33))]
    assert slots.feed(prompts).greedy(None) == plain.feed(prompts).greedy(None)
    for feeds in (
        [Feed(0, 50, (1,)), Feed(1, 33, (2,))],
        [Feed(1, 40, (5,)), Feed(0, 20, (6,))],  # far back: read again
        [Feed(0, 0, (6,))],
    ):
        assert list(slots.run_greedy(feeds, None)) == list(plain.run_greedy(feeds, None))
    assert [len(list(generate(ours, [ids(90)], Sampling(max_new_tokens=30))))] == [30]


@pytest.mark.parametrize("bits", [None, 8])
def test_memory_stops_growing(bits: int | None) -> None:
    spec = small_spec(
        head_dim=32,
        max_position_embeddings=2000,
        window=SlidingWindowSpec(enabled=True, sliding_window=7, max_window_layers=0),
    )
    store = SlotStore(spec, 2, mx.float32, bits, 2000)
    sizes = []
    for start in range(0, 2000, 5):
        store.slide(1, start, 5)
        store.reserve(7, start + 5 - store.base(7, 1))
        sizes.append(sum(array.nbytes for array in store.arrays()))
    assert sizes[10] == sizes[-1]
    assert store.room(7) <= 7 + 3 + 8 + 8


def test_what_forgets_cannot_be_saved() -> None:
    ours = model(MIXED, random_weights(MIXED))
    slots = ours.slots(1, 100)
    slots.feed([Feed(0, 0, ids(50))])
    with pytest.raises(BackendError, match="sliding window and cannot be saved"):
        list(slots.export(0, 50))
    with pytest.raises(BackendError, match="sliding window and cannot be saved"):
        slots.restore(0, iter(()))
