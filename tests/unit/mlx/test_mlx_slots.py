"""Slots with a cache against slots without one, under every kind of feed."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit.backend.slots import Feed, PersistentSlots  # noqa: E402
from qwen2kit.engine.recompute import RecomputingSlots  # noqa: E402
from qwen2kit.errors import BackendError, WeightError  # noqa: E402
from qwen2kit.weights.tensor import from_numpy  # noqa: E402
from qwen2kit_mlx.compiled import MLXModel  # noqa: E402
from qwen2kit_mlx.cuda_kernels import CUDAKernels  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.unit.mlx.setup_mlx import KERNELS, SPECS, model  # noqa: E402

RNG = np.random.default_rng(9)


def ids(count: int) -> tuple[int, ...]:
    return tuple(RNG.integers(0, 199, count).tolist())


# Prefill of unequal prompts; decoding of some, at different lengths; speculation; a slot emptied
# and filled with a long prompt while others go on; neighbours that are not neighbours.
STEPS = [
    [Feed(0, 0, ids(30)), Feed(2, 0, ids(5), wanted=5), Feed(1, 0, ids(17), wanted=0)],
    [Feed(2, 5, ids(1)), Feed(0, 30, ids(1))],
    [Feed(0, 31, ids(4), wanted=4), Feed(3, 0, ids(2)), Feed(1, 17, ids(7), wanted=2)],
    [Feed(0, 33, ids(1)), Feed(1, 20, ids(40), wanted=20), Feed(2, 6, ids(1)), Feed(3, 0, ids(20))],
    [Feed(3, 20, ids(1)), Feed(0, 34, ids(1))],
    [Feed(slot, start, ids(1)) for slot, start in ((1, 60), (3, 21), (2, 7), (0, 2))],
    [Feed(2, 8, ids(3), wanted=0)],
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["tied", "yarn", "window", "wide heads"])
def test_any_feeds_equal_whole_passes(
    name: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[name]
    ours = model(spec, random_weights(spec), kernels)
    for tokens in (2048, 23):
        monkeypatch.setattr("qwen2kit_mlx.passes.PREFILL_TOKENS", tokens)
        slots, plain = ours.slots(4, 100), RecomputingSlots(ours, 4, 100)
        for feeds in STEPS:
            wanted = sum(feed.wanted for feed in feeds)
            got, expected = slots.feed(feeds), plain.feed(feeds)
            rows = expected.rows(range(wanted))
            np.testing.assert_allclose(got.rows(range(wanted)), rows, rtol=0, atol=2e-4)
            assert got.greedy(150) == expected.greedy(150)
        slots.close()


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_runs_until_a_slot_is_full(kernels: str) -> None:
    spec = SPECS["window"]
    ours = model(spec, random_weights(spec), kernels)
    slots, plain = ours.slots(3, 40), RecomputingSlots(ours, 3, 40)
    prompts = [Feed(0, 0, ids(9)), Feed(1, 0, ids(4)), Feed(2, 0, ids(21))]
    assert slots.feed(prompts).greedy(None) == plain.feed(prompts).greedy(None)
    feeds = [Feed(2, 21, (7,)), Feed(0, 9, (11,))]
    steps = list(slots.run_greedy(feeds, 150))
    assert steps == list(plain.run_greedy(feeds, 150))
    assert len(steps) == 40 - 21


def test_greedy_may_be_left_early() -> None:
    """What was yielded before the last step is in the slot."""
    ours = model(SPECS["tied"], random_weights(SPECS["tied"]))
    slots, plain = ours.slots(2, 60), RecomputingSlots(ours, 2, 60)
    running = slots.run_greedy([Feed(1, 0, (5,))], None)
    (first,), (second,) = next(running), next(running)
    running.close()  # type: ignore[attr-defined]
    after = [Feed(1, 2, (second, 3))]
    plain.feed([Feed(1, 0, (5, first))])
    assert slots.feed(after).greedy(None) == plain.feed(after).greedy(None)


def test_copies_are_independent() -> None:
    spec = small_spec(max_position_embeddings=400)
    ours = model(spec, random_weights(spec))
    slots, plain = ours.slots(3, 400), RecomputingSlots(ours, 3, 400)
    for each in (slots, plain):
        each.feed([Feed(0, 0, tuple(range(150)) * 2)])
        each.copy(0, 2, 290)
    for feeds in ([Feed(0, 280, (9, 9, 9))], [Feed(2, 290, (4,))], [Feed(0, 283, (1,))]):
        np.testing.assert_allclose(
            slots.feed(feeds).rows([0]), plain.feed(feeds).rows([0]), rtol=0, atol=2e-4
        )


@pytest.mark.usefixtures("compiler")
def test_compiled_steps_change_nothing() -> None:
    """Every number of rows compiles anew; results are those of the uncompiled model."""
    spec = small_spec(num_hidden_layers=2)
    plain = model(spec, random_weights(spec))
    fused = MLXModel(spec, mx.Device(mx.cpu), mx.float32, CUDAKernels(fuse=True), 256)
    fused.load(random_weights(spec))
    slots, expected = fused.slots(3, 100), plain.slots(3, 100)
    for feeds in (
        [Feed(0, 0, ids(80)), Feed(1, 0, ids(3))],  # too many rows to compile
        [Feed(0, 80, ids(1))],
        [Feed(0, 81, ids(1)), Feed(1, 3, ids(1))],
        [Feed(0, 82, ids(2)), Feed(1, 4, ids(2)), Feed(2, 0, ids(1))],
    ):
        rows = range(len(feeds))
        np.testing.assert_allclose(
            slots.feed(feeds).rows(rows), expected.feed(feeds).rows(rows), rtol=0, atol=2e-4
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slots_leave_the_device_and_come_back(dtype: str) -> None:
    spec = SPECS["tied"]
    ours = model(spec, random_weights(spec), dtype=getattr(mx, dtype))
    slots, other = ours.slots(2, 64), ours.slots(1, 64)
    assert isinstance(slots, PersistentSlots)
    slots.feed([Feed(1, 0, tuple(range(40)))])
    saved = list(slots.export(1, 33))
    assert {tensor.dtype for _, tensor in saved} == {dtype}
    assert {tensor.shape for _, tensor in saved} == {(spec.num_key_value_heads, 33, spec.head_dim)}
    other.restore(0, iter(saved))
    expected = slots.feed([Feed(1, 33, (8,))]).rows([0])
    assert np.array_equal(other.feed([Feed(0, 33, (8,))]).rows([0]), expected)
    with pytest.raises(WeightError, match="layers"):
        other.restore(0, iter(saved[:-1]))
    half = from_numpy(np.zeros(saved[0][1].shape, dtype=np.float16))
    keys = "layers.1." + ("anchored_keys" if dtype == "float32" else "keys")
    odd = [(name, half if name == keys else tensor) for name, tensor in saved]
    with pytest.raises(WeightError, match=rf"{keys} .* float16"):
        other.restore(0, iter(odd))
    with pytest.raises(WeightError, match="33 tokens, a slot here holds 20"):
        ours.slots(1, 20).restore(0, iter(saved))


def test_impossible_slots_are_refused() -> None:
    spec = small_spec()
    ours = model(spec, random_weights(spec))
    for count, capacity in ((1, 257), (1, 0), (0, 10)):
        with pytest.raises(BackendError, match="slots of"):
            ours.slots(count, capacity)


def test_memory_follows_the_tokens_and_is_given_back() -> None:
    spec = small_spec(max_position_embeddings=4096)
    ours = model(spec, random_weights(spec))
    before = mx.get_active_memory()
    slots = ours.slots(8, 4096)
    assert mx.get_active_memory() - before < 4096
    slots.feed([Feed(0, 0, ids(300))]).greedy(None)
    column = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * 4
    held = mx.get_active_memory() - before
    assert 8 * 300 * column <= held < 8 * 600 * column
    slots.close()
    mx.synchronize()
    assert mx.get_active_memory() - before < 100_000
