"""Keys and values in 4 and 8 bits: against mlx-lm's own quantised cache, and against themselves.

Two computations of the same round a few numbers to different steps, so they differ by a small part
of the error that the rounding makes; `assert_same` measures against that error.
"""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
cache_module = pytest.importorskip("mlx_lm.models.cache")

from qwen2kit.backend.plan import ExecutionPlan  # noqa: E402
from qwen2kit.backend.registry import get  # noqa: E402
from qwen2kit.backend.slots import Feed  # noqa: E402
from qwen2kit.errors import BackendError, WeightError  # noqa: E402
from qwen2kit.spec.model import SlidingWindowSpec  # noqa: E402
from qwen2kit_mlx.compiled import MLXModel  # noqa: E402
from qwen2kit_mlx.slot_store import SlotStore  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.unit.mlx.setup_mlx import KERNELS  # noqa: E402
from tests.unit.mlx.test_mlx_against_mlx_lm import mlx_lm_model  # noqa: E402

RNG = np.random.default_rng(3)
SPEC = small_spec(head_dim=32, hidden_size=128)
WINDOW = small_spec(
    head_dim=32,
    window=SlidingWindowSpec(enabled=True, sliding_window=9, max_window_layers=1),
)


def ids(count: int) -> tuple[int, ...]:
    return tuple(RNG.integers(0, 199, count).tolist())


def model(bits: int | None, kernels: str = "native", spec: object = SPEC) -> MLXModel:
    made = MLXModel(spec, mx.Device(mx.cpu), mx.float32, KERNELS[kernels], 256, bits)  # type: ignore[arg-type]
    made.load(random_weights(spec))  # type: ignore[arg-type]
    return made


def assert_same(got: np.ndarray, expected: np.ndarray, exact: np.ndarray) -> None:
    assert np.abs(got - expected).mean() < 0.1 * np.abs(expected - exact).mean()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bits", [8, 4])
def test_logits_are_those_of_mlx_lms_quantised_cache(bits: int, kernels: str) -> None:
    theirs = mlx_lm_model(SPEC, None)
    cache = [
        cache_module.QuantizedKVCache(group_size=32, bits=bits)
        for _ in range(SPEC.num_hidden_layers)
    ]
    slots, plain = model(bits, kernels).slots(1, 64), model(None, kernels).slots(1, 64)
    start = 0
    for tokens in (ids(20), ids(3), ids(1), ids(1)):
        feeds, every = [Feed(0, start, tokens, len(tokens))], range(len(tokens))
        with mx.stream(mx.cpu):
            expected = np.array(theirs(mx.array([tokens]), cache=cache)[0])
        assert_same(slots.feed(feeds).rows(every), expected, plain.feed(feeds).rows(every))
        start += len(tokens)


@pytest.mark.parametrize("spec", [SPEC, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_few_queries_and_many_see_the_same(kernels: str, spec: object) -> None:
    """Ragged decoding and speculation over packed numbers against one long feed of the same."""
    ours = model(8, kernels, spec)
    slots, whole, plain = (m.slots(3, 128) for m in (ours, ours, model(None, kernels, spec)))
    texts = [ids(40), ids(31), ids(35)]
    slots.feed([Feed(i, 0, text[:25], 0) for i, text in enumerate(texts)])
    decoded = slots.feed([Feed(i, 25, text[25:29], 4) for i, text in enumerate(texts)])
    last = slots.feed([Feed(2, 29, texts[2][29:30]), Feed(0, 29, texts[0][29:34], 5)])
    first = [Feed(i, 0, text[:29], 4) for i, text in enumerate(texts)]
    second = [Feed(2, 0, texts[2][:30]), Feed(0, 0, texts[0][:34], 5)]
    for got, feeds, count in ((decoded, first, 12), (last, second, 6)):
        exact = plain.feed(feeds).rows(range(count))
        assert_same(got.rows(range(count)), whole.feed(feeds).rows(range(count)), exact)


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.05), (4, 0.8)])
def test_the_error_is_that_of_so_many_bits(bits: int, worst: float) -> None:
    tokens = ids(60)
    exact = model(None).slots(1, 64).feed([Feed(0, 0, tokens, 60)]).rows(range(60))
    packed = model(bits).slots(1, 64).feed([Feed(0, 0, tokens, 60)]).rows(range(60))
    error = np.abs(packed - exact).max() / np.abs(exact).max()
    assert worst / 100 < error < worst


def test_slots_are_copied_moved_saved_and_restored() -> None:
    ours = model(8)
    slots, other, more = ours.slots(3, 128), ours.slots(1, 128), ours.slots(1, 128)
    text = ids(50)
    slots.feed([Feed(0, 0, text, 0), Feed(2, 0, ids(9), 0)])
    more.feed([Feed(0, 0, text, 0)])
    slots.copy(0, 1, 45)
    slots.feed([Feed(0, 50, (1,)), Feed(2, 9, (1,))])  # not neighbours: rows change places
    expected = more.feed([Feed(0, 45, (7, 8), 2)]).rows([0, 1])
    np.testing.assert_array_equal(slots.feed([Feed(1, 45, (7, 8), 2)]).rows([0, 1]), expected)
    other.restore(0, slots.export(1, 45))
    np.testing.assert_array_equal(other.feed([Feed(0, 45, (7, 8), 2)]).rows([0, 1]), expected)
    with pytest.raises(WeightError, match="in the form this model keeps them"):
        model(None).slots(1, 128).restore(0, slots.export(1, 45))


@pytest.mark.parametrize(("bits", "share"), [(8, 0.6), (4, 0.35)])
def test_memory_shrinks(bits: int, share: float) -> None:
    """Against bfloat16, scales and biases included."""
    stores = [SlotStore(SPEC, 2, mx.bfloat16, width) for width in (None, bits)]
    sizes = []
    for store in stores:
        store.reserve(None, 1024)
        sizes.append(sum(array.nbytes for array in store.arrays()))
    assert sizes[1] <= share * sizes[0]


def test_what_cannot_be_packed_is_refused() -> None:
    backend = get("mlx")
    assert backend.capabilities().cache_bits == (4, 8)
    with pytest.raises(BackendError, match=r"4 or 8 bits .* not in 5 bits"):
        backend.compile(SPEC, ExecutionPlan(cache_bits=5))
    with pytest.raises(BackendError, match="multiple of 32; this model's is 16"):
        backend.compile(small_spec(head_dim=16), ExecutionPlan(cache_bits=8))


def test_backends_without_it_say_so() -> None:
    pytest.importorskip("torch")
    with pytest.raises(BackendError, match="leave out cache_bits"):
        get("torch").compile(SPEC, ExecutionPlan(cache_bits=8))
