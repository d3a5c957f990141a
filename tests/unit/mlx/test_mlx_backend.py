"""What the MLX backend promises and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit.backend.plan import ExecutionPlan, TrainPlan  # noqa: E402
from qwen2kit.backend.protocol import Backend, CompiledModel  # noqa: E402
from qwen2kit.backend.registry import get  # noqa: E402
from qwen2kit.errors import BackendError  # noqa: E402
from qwen2kit.spec.model import DualChunkSpec  # noqa: E402
from qwen2kit.spec.presets import preset  # noqa: E402
from qwen2kit.spec.reference import ReferenceModel  # noqa: E402
from qwen2kit_mlx.backend import MLXBackend  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402

DUAL_CHUNK = small_spec(dual_chunk=DualChunkSpec(chunk_size=24, local_size=8))


def test_the_registry_finds_it() -> None:
    backend = get("mlx")
    assert isinstance(backend, Backend)
    assert backend.name == "mlx"
    assert set(backend.versions()) == {"mlx"}
    assert isinstance(backend.compile(small_spec(), ExecutionPlan()), CompiledModel)


def test_devices_begin_with_the_default() -> None:
    devices = MLXBackend().devices()
    names = [device.name for device in devices]
    assert names[0] == ("gpu" if mx.default_device().type == mx.gpu else "cpu")
    assert "cpu" in names
    assert all(device.kind for device in devices)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (ExecutionPlan(train=TrainPlan()), "training runs on torch"),
        (ExecutionPlan(device="cuda:0"), "no device 'cuda:0'"),
        (ExecutionPlan(device="tpu"), "it has: .*cpu"),
        (ExecutionPlan(max_seq_len=257), "max_seq_len=257 .* 1 to 256"),
    ],
)
def test_plans_it_cannot_run_are_refused(plan: ExecutionPlan, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        MLXBackend().compile(small_spec(), plan)


def test_mixtures_of_experts_are_refused() -> None:
    with pytest.raises(BackendError, match="mixture-of-experts"):
        MLXBackend().compile(preset("qwen2-57b-a14b"), ExecutionPlan())


def test_dual_chunk_models_run_up_to_one_chunk() -> None:
    weights = random_weights(DUAL_CHUNK)
    model = MLXBackend().compile(DUAL_CHUNK, ExecutionPlan(device="cpu"))
    model.load(weights)
    tokens = list(range(25))
    expected = ReferenceModel(small_spec(), weights).logits(tokens)
    assert np.abs(model.logits(tokens) - expected).max() < 1e-4
    with pytest.raises(BackendError, match="takes 25"):
        model.logits(list(range(26)))
    with pytest.raises(BackendError, match="dual chunk"):
        MLXBackend().compile(DUAL_CHUNK, ExecutionPlan(max_seq_len=26))


def test_a_shorter_limit_holds() -> None:
    spec = small_spec()
    model = MLXBackend().compile(spec, ExecutionPlan(device="cpu", max_seq_len=8))
    model.load(random_weights(spec))
    with pytest.raises(BackendError, match="takes 8"):
        model.logits(list(range(9)))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_every_dtype_computes_in_that_dtype(dtype: str) -> None:
    spec = small_spec()
    model = MLXBackend().compile(spec, ExecutionPlan(device="cpu", dtype=dtype))
    model.load(random_weights(spec))
    expected = "float32" if dtype == "auto" else dtype
    assert {tensor.dtype for _, tensor in model.export()} == {expected}
    assert model.logits([1, 2]).dtype == np.float32
