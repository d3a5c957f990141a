"""How many slots fit, and that a Mac's wired limit is set and restored."""

from __future__ import annotations

import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit.errors import BackendError  # noqa: E402
from qwen2kit.spec.presets import preset  # noqa: E402
from qwen2kit_mlx.memory import Wired, free_bytes, slots_that_fit, token_bytes  # noqa: E402
from qwen2kit_mlx.slot_store import SlotStore  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.unit.mlx.setup_mlx import model  # noqa: E402


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_token_takes_what_the_store_takes(bits: int | None) -> None:
    spec = small_spec(head_dim=64)
    store = SlotStore(spec, 3, mx.bfloat16, bits)
    store.reserve(None, 512)
    stored = sum(array.nbytes for array in store.arrays())
    assert stored == 3 * 512 * token_bytes(spec, mx.bfloat16, bits)


def test_a_7b_model_takes_57_kilobytes_a_token() -> None:
    """28 layers, 4 heads of 128, two bytes, keys and values."""
    assert token_bytes(preset("qwen2-7b"), mx.bfloat16, None) == 2 * 28 * 4 * 128 * 2


def test_fewer_slots_where_memory_is_short() -> None:
    assert slots_that_fit(8, 512, 1000, None) == 8
    assert slots_that_fit(8, 512, 1000, 1 << 30) == 8
    assert slots_that_fit(8, 512, 1000, 3 * 512_000) == 3
    assert slots_that_fit(8, 500, 1000, 3 * 512_000) == 3  # memory comes in blocks of 256
    for free in (511_999, 0, -5):
        with pytest.raises(BackendError, match=r"fewer tokens .*--context.* or use --cache-bits"):
            slots_that_fit(8, 512, 1000, free)


def test_the_model_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec()
    ours = model(spec, random_weights(spec))
    per_slot = 256 * token_bytes(spec, mx.float32, None)
    monkeypatch.setattr("qwen2kit_mlx.compiled.free_bytes", lambda device: 2 * per_slot)
    assert ours.slots(5, 100).count == 2


def test_free_memory_falls_with_what_is_held() -> None:
    before = free_bytes(mx.Device(mx.cpu))
    held = mx.zeros((1 << 22,))
    mx.eval(held)
    after = free_bytes(mx.Device(mx.cpu))
    assert before is not None
    assert after is not None
    assert before - after >= held.nbytes


@pytest.mark.parametrize("fits", [True, False])
def test_the_wired_limit_is_restored_by_the_last_one_out(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [5]

    def set_wired_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    size = 1 << 40 if fits else 1
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *_: {"max_recommended_working_set_size": size})
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    held = mx.zeros((64,))
    mx.eval(held)
    with Wired():
        with Wired():
            assert limits == ([5, size] if fits else [5])
        assert limits[-1] == (size if fits else 5)
    assert limits == ([5, size, 5] if fits else [5])


def test_elsewhere_the_limit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if mx.metal.is_available():
        pytest.skip("this machine has Metal")
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail("not on this machine"))
    spec = small_spec()
    model(spec, random_weights(spec)).slots(1, 8).close()
