"""Weights in 4 and 8 bits: the values are core's (MLX's), or kept as a checkpoint has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.plan import ExecutionPlan, TrainPlan
from qwen2kit.backend.slots import Feed
from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.spec.schema import schema
from qwen2kit.weights import affine
from qwen2kit.weights.source import AffineTensor, MemorySource, TensorInfo
from qwen2kit.weights.tensor import HostTensor, from_float32
from tests.conftest import random_weights, small_spec
from tests.unit.torch.peers import SPECS, TOKENS, ours
from tests.unit.torch.test_torch_slots import alone

torch = pytest.importorskip("torch")

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


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (8, 128)])
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
        assert layer.mlp.down_proj.weight.dtype == torch.int32
        np.testing.assert_allclose(model.logits(TOKENS), expected.logits(TOKENS), atol=1e-5)
        assert alone(model, TOKENS, 8) == alone(expected, TOKENS, 8)
    for name, tensor in kept.export():
        np.testing.assert_allclose(tensor.float32(), stored.read(name).float32(), atol=1e-7)
    assert np.abs(kept.logits(TOKENS) - ours(SPEC).logits(TOKENS)).max() > 1e-4


@pytest.mark.parametrize("group", [32, 64])
def test_values_are_those_of_pytorchs_own_products(group: int) -> None:
    from qwen2kit_torch.quantized import from_words, quantize

    torch.manual_seed(0)
    matrix = quantize(torch.randn(48, 128), bits=4, group=group)
    codes = from_words(matrix.codes, 4).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales, offsets = matrix.steps.unbind(-1)
    steps = torch.stack([scales, offsets + 8 * scales], -1).transpose(0, 1)
    x = torch.randn(3, 128)
    expected = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, steps.contiguous())
    torch.testing.assert_close(x @ matrix.dense(torch.float32).t(), expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_on_a_cpu_reads_the_codes_while_decoding() -> None:
    model = ours(SPEC, weight_bits=4, weight_group_size=32, dtype="bfloat16")
    exact = ours(SPEC, MemorySource.collect(model.export())).logits(TOKENS)[-1]
    expanded = model.logits(TOKENS)[-1]
    slots = model.slots(1, 32)
    slots.feed([Feed(0, 0, tuple(TOKENS[:-1]))])
    found = slots.feed([Feed(0, len(TOKENS) - 1, (TOKENS[-1],))]).rows([0])[0]
    assert model.module.model.layers[0].mlp.down_proj._for_cpu is not None
    assert np.abs(found - exact).mean() <= 2 * np.abs(expanded - exact).mean()


@pytest.mark.parametrize(("bits", "dtype"), [(8, "float32"), (4, "float32"), (8, "bfloat16")])
def test_a_cpu_expands_what_it_cannot_read_quickly(bits: int, dtype: str) -> None:
    model = ours(SPEC, weight_bits=bits, weight_group_size=32, dtype=dtype)
    before = MemorySource.collect(model.export())
    dense = ours(SPEC, before, dtype=dtype)
    assert alone(model, TOKENS, 8) == alone(dense, TOKENS, 8)
    layer = model.module.model.layers[0].mlp.down_proj
    assert layer._expanded
    assert layer.steps.numel() == 0
    np.testing.assert_allclose(model.logits(TOKENS), dense.logits(TOKENS), atol=1e-5)
    for name, tensor in model.export():
        np.testing.assert_array_equal(tensor.float32(), before.read(name).float32())
    model.load(random_weights(SPEC))
    assert layer.weight.dtype == torch.int32
    for name, tensor in model.export():
        np.testing.assert_array_equal(tensor.float32(), before.read(name).float32())


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


@pytest.mark.parametrize("name", ["qwen2-0.5b", "qwen2-7b", "qwen2-72b"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_launch_of_a_pass_stays_within_the_shared_scratch(
    name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from qwen2kit.spec.presets import preset
    from qwen2kit_torch.engine import packed_products
    from qwen2kit_torch.quantized import Quantized

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            def launch(*given: Any, num_warps: int) -> None:
                parts, arrived, count, _, width, _, rows, block, span, splits = given[5:15]
                launched.append(count)
                assert count <= rows
                assert width % span == 0
                assert grid[1] == splits
                assert grid[0] <= arrived.numel()
                assert splits == 1 or grid[0] * block * rows * splits <= parts.numel()

            return launch

    launched: list[int] = []
    monkeypatch.setattr(packed_products.packed, "packed_rows", Kernel())
    spec = preset(name)
    hidden, ffn, size = spec.hidden_size, spec.intermediate_size, spec.head_dim
    heads = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * size
    shapes = (heads, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn)

    def meta(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    matrices = [
        Quantized(
            meta(height, width * bits // 32, dtype=torch.int32),
            meta(height, width // 32, 2),
            bits,
            32,
        )
        for height, width in shapes
    ]
    for rows in range(1, 193):
        scratch = packed_products.scratch_for(matrices, rows, 2)
        launched.clear()
        for matrix in matrices:
            height, width = matrix.shape
            x, out = meta(rows, width), meta(rows, height)
            packed_products.product(x, matrix, out, scratch=scratch)
        assert sum(launched) == rows * len(matrices)
