"""Weights in 4 and 8 bits: the values are core's (MLX's), kept from checkpoints, and the kernels
that read them, by Triton's interpreter, compute what the expanded matrices do."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.plan import ExecutionPlan, TrainPlan
from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.spec.schema import schema
from qwen2kit.weights import affine
from qwen2kit.weights.source import AffineTensor, MemorySource, TensorInfo
from qwen2kit.weights.tensor import HostTensor, from_float32
from tests.conftest import random_weights, small_spec
from tests.unit.torch.peers import SPECS, TOKENS, ours
from tests.unit.torch.test_torch_slots import alone

torch = pytest.importorskip("torch")

FORMS = [(4, 32), (4, 64), (8, 32), (8, 128)]
SPEC = small_spec(hidden_size=128, intermediate_size=256, num_hidden_layers=1, head_dim=32)


class Stored:
    """The linear weights of a source, packed; the rest dense."""

    def __init__(self, source: MemorySource, spec: Any, bits: int, group: int) -> None:
        self._source, self._bits, self._group = source, bits, group
        self._linear = {param.name for param in schema(spec) if param.kind == "linear"}

    def names(self) -> tuple[str, ...]:
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        return self._source.info(name)

    def read(self, name: str) -> HostTensor:
        packed = self.affine(name)
        return self._source.read(name) if packed is None else affine.dequantize(packed)

    def affine(self, name: str) -> AffineTensor | None:
        if name not in self._linear:
            return None
        return affine.quantize(self._source.read(name), bits=self._bits, group_size=self._group)


@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_core(bits: int, group: int, dtype: str) -> None:
    from qwen2kit_torch.quantized import quantize
    from qwen2kit_torch.weights import as_tensor

    values = np.random.default_rng(0).standard_normal((24, 256)).astype(np.float32)
    values[3] = 0
    values[4] = np.abs(values[4])
    host = from_float32(values, dtype)  # type: ignore[arg-type]
    expected = affine.dequantize(affine.quantize(host, bits=bits, group_size=group)).float32()
    matrix = quantize(as_tensor(host), bits=bits, group=group)
    assert matrix.codes.nbytes * 8 == values.size * bits
    assert matrix.shape == values.shape
    np.testing.assert_array_equal(matrix.dense(torch.float32).numpy(), expected)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_a_model_computes_with_the_quantised_values(bits: int, group: int) -> None:
    weights = random_weights(SPEC)
    stored = Stored(weights, SPEC, bits, group)
    expected = ours(SPEC, MemorySource({n: stored.read(n) for n in stored.names()}))
    kept = ours(SPEC, stored, weight_bits=bits, weight_group_size=128)
    made = ours(SPEC, weights, weight_bits=bits, weight_group_size=group)
    for model in (kept, made):
        layer = model.module.model.layers[0]
        assert layer.mlp.down_proj.weight.dtype == torch.uint8
        np.testing.assert_allclose(model.logits(TOKENS), expected.logits(TOKENS), atol=1e-5)
        assert alone(model, TOKENS, 8) == alone(expected, TOKENS, 8)
    for name, tensor in kept.export():
        np.testing.assert_allclose(tensor.float32(), stored.read(name).float32(), atol=1e-7)
    assert np.abs(kept.logits(TOKENS) - ours(SPEC).logits(TOKENS)).max() > 1e-4


def test_rows_that_do_not_divide_stay_dense() -> None:
    model = ours(SPECS["tied"], weight_bits=4, weight_group_size=64)
    layer = model.module.model.layers[0]
    assert layer.mlp.down_proj.weight.dtype == torch.float32


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BackendError, match="4 or 8 bits, not to 3"):
        ours(SPEC, weight_bits=3)
    with pytest.raises(ConfigError, match="weight_group_size"):
        ExecutionPlan(weight_bits=4, weight_group_size=48)
    with pytest.raises(ConfigError, match="for inference"):
        ExecutionPlan(weight_bits=4, train=TrainPlan())


@pytest.fixture
def _interpreted() -> None:
    if torch.cuda.is_available():
        pytest.skip("compiled kernels are tested instead")
    os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton")


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_kernels_compute_what_the_expanded_matrix_does(bits: int, group: int) -> None:
    from qwen2kit_torch.engine.packed_products import dequantize, product
    from qwen2kit_torch.quantized import quantize

    torch.manual_seed(0)
    matrix = quantize(torch.randn(70, 256), bits=bits, group=group)
    dense = matrix.dense(torch.float32)
    torch.testing.assert_close(dequantize(matrix, torch.float32), dense)
    for rows in (2, 17, 65):
        x, bias = torch.randn(rows, 256), torch.randn(70)
        for added in (None, bias):
            out = torch.empty(rows, 70)
            product(x, matrix, out, added)
            expected = torch.nn.functional.linear(x, dense, added)
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 64)])
def test_a_step_of_one_row_reads_packed_weights(bits: int, group: int) -> None:
    from tests.unit.torch.stepped import Stepped

    model = ours(SPEC, weight_bits=bits, weight_group_size=group)
    expected = model.logits(TOKENS)
    slots = Stepped(model, 1, 32, 1)
    for position in range(3):
        found = slots.run([(TOKENS[position], 0, position)])
        np.testing.assert_allclose(found[0], expected[position], atol=1e-4)
