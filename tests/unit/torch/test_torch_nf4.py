"""NF4 against the paper, bitsandbytes and torchao; its product against that of dense weights."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from qwen2kit.errors import BackendError
from tests.conftest import small_spec
from tests.tiny_adapter import TARGETS

torch = pytest.importorskip("torch")
from qwen2kit.backend.plan import LoRAPlan  # noqa: E402
from qwen2kit_torch.lora import FrozenLinear, LoRALinear, add_lora  # noqa: E402
from qwen2kit_torch.lora_nf4 import (  # noqa: E402
    CODEBOOK,
    dequantize,
    nf4_linear,
    packed_sizes,
    quantize,
)
from qwen2kit_torch.model import Qwen2  # noqa: E402

# Appendix E of arXiv 2305.14314.
PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def matrix(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_the_codebook_is_the_published_one() -> None:
    assert np.float32(CODEBOOK).tolist() == np.float32(PUBLISHED).tolist()


def test_it_is_made_of_equally_likely_quantiles() -> None:
    """Section 3: the codes are evenly spaced quantiles of N(0, 1) on either side of zero."""
    from statistics import NormalDist

    edge = NormalDist().inv_cdf(0.9677083)
    levels = [NormalDist().cdf(value * edge) for value in CODEBOOK]
    np.testing.assert_allclose(np.diff(levels[:8]), (0.5 - levels[0]) / 7, atol=1e-6)
    np.testing.assert_allclose(np.diff(levels[7:]), (levels[-1] - 0.5) / 8, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 160), (3, 64), (32, 2), (64,)])
def test_each_weight_takes_the_nearest_code(shape: tuple[int, ...]) -> None:
    weight = matrix(*shape)
    packed, absmax = quantize(weight)
    assert (packed.dtype, packed.numel()) == (torch.uint8, weight.numel() // 2)
    found = dequantize(packed, absmax, shape, torch.float32).numpy().reshape(-1, 64)
    blocks = weight.numpy().reshape(-1, 64)
    values = np.float32(CODEBOOK)
    scale = np.abs(blocks).max(1, keepdims=True)
    nearest = values[np.abs((blocks / scale)[..., None] - values).argmin(-1)] * scale
    np.testing.assert_allclose(found, nearest, rtol=1e-6)
    assert np.array_equal(absmax.numpy(), scale[:, 0])
    peaks = np.abs(blocks).argmax(1)
    rows = np.arange(len(blocks))
    assert np.array_equal(found[rows, peaks], blocks[rows, peaks])


def test_zero_blocks_and_values_stay_zero() -> None:
    weight = torch.zeros(4, 64)
    weight[1, 5] = 3.0
    assert torch.equal(dequantize(*quantize(weight), (4, 64), torch.float32), weight)


def test_quantising_again_changes_nothing() -> None:
    once = dequantize(*quantize(matrix(64, 64)), (64, 64), torch.float32)
    assert torch.equal(dequantize(*quantize(once), (64, 64), torch.float32), once)


def test_matrices_that_do_not_divide_into_blocks() -> None:
    assert packed_sizes((64, 3)) == (96, 3)
    with pytest.raises(BackendError, match=r"\[63, 3\] does not divide into NF4 blocks"):
        quantize(matrix(63, 3))


PROBE = """
import sys
import numpy as np, torch
weight = torch.from_numpy(np.load(sys.argv[1]))
{body}
np.savez(sys.argv[2], packed=packed.numpy(), absmax=absmax.numpy(), dense=dense.float().numpy())
"""
BODIES = {
    "bitsandbytes": """
import bitsandbytes.functional as F
packed, state = F.quantize_4bit(weight, blocksize=64, quant_type="nf4")
absmax = state.absmax
dense = F.dequantize_4bit(packed, state)
packed = packed.view(-1)
""",
    "torchao": """
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
nf4 = to_nf4(weight, 64, 1)
packed = nf4.quantized_data.view(-1)
absmax = weight.view(-1, 64).abs().amax(-1).float()
dense = nf4.get_original_weight()
""",
}


@pytest.mark.parametrize(
    ("library", "dtype"),
    [("bitsandbytes", "float32"), ("bitsandbytes", "bfloat16"), ("torchao", "float32")],
)
def test_it_is_the_nf4_of(library: str, dtype: str, tmp_path: Any) -> None:
    """In a process of its own: both libraries register operators when they are imported."""
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    weight = matrix(128, 320).to(getattr(torch, dtype))
    np.save(tmp_path / "weight.npy", weight.float().numpy())
    body = f"weight = weight.to(torch.{dtype})\n{BODIES[library]}"
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(body=body), tmp_path / "weight.npy", tmp_path / "o"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "o.npz")
    packed, absmax = quantize(weight)
    assert np.array_equal(absmax.numpy(), theirs["absmax"])
    same = packed.numpy() == theirs["packed"]
    assert same.mean() > (0.999 if library == "torchao" else 1 - 1e-9)
    dense = dequantize(packed, absmax, tuple(weight.shape), weight.dtype).float().numpy()
    exact = np.repeat(same, 2).reshape(dense.shape)
    tolerance = 0.0 if library == "bitsandbytes" else 5e-3 * np.abs(dense).max()
    np.testing.assert_allclose(dense[exact], theirs["dense"][exact], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_those_of_the_dense_weight(dtype: Any, bias: bool) -> None:
    shape = (96, 64)
    packed, absmax = quantize(matrix(*shape))
    dense = dequantize(packed, absmax, shape, dtype)
    offset = matrix(96, seed=1).to(dtype) if bias else None
    x = matrix(2, 5, 64, seed=2).to(dtype)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = nf4_linear(mine, packed, absmax, offset, 96)
    expected = torch.nn.functional.linear(theirs, dense, offset)
    assert torch.equal(found, expected)
    slope = matrix(2, 5, 96, seed=3).to(dtype)
    found.backward(slope)
    expected.backward(slope)
    assert torch.equal(mine.grad, theirs.grad)


def test_its_gradient_is_the_numerical_one() -> None:
    packed, absmax = quantize(matrix(8, 16))
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: nf4_linear(value, packed, absmax, None, 8), (x,))


def test_it_is_a_well_behaved_operator() -> None:
    """Its fake, its autograd and its behaviour under tracing, by PyTorch's own checker."""
    packed, absmax = quantize(matrix(96, 64))
    bias = matrix(96, seed=1)
    for leading in ((5,), (2, 3)):
        x = matrix(*leading, 64, seed=2).requires_grad_()
        for offset in (bias, None):
            operator = torch.ops.qwen2kit.nf4_linear.default
            torch.library.opcheck(operator, (x, packed, absmax, offset, 96))


def test_a_compiler_cannot_keep_the_dense_weight() -> None:
    """What a compiled layer saves for its backward pass is what the plain one saves."""
    packed, absmax = quantize(matrix(256, 256))

    def saved(function: Any) -> int:
        kept: dict[int, int] = {}

        def note(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = matrix(4, 256).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            function(x).sum().backward()
        return sum(kept.values())

    def layer(x: Any) -> Any:
        return torch.nn.functional.silu(nf4_linear(x, packed, absmax, None, 256))

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    dense = 256 * 256 * 4
    assert saved(compiled) <= saved(layer) < dense


def test_the_dense_weight_is_not_kept_for_the_backward_pass() -> None:
    packed, absmax = quantize(matrix(256, 256))
    kept: list[int] = []

    def note(tensor: Any) -> Any:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    x = matrix(1, 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        nf4_linear(x, packed, absmax, None, 256)
    assert sum(kept) <= 256 * 256 // 2 + 256 * 256 // 64 * 4


def test_the_base_takes_four_and_a_half_bits_a_weight() -> None:
    model = Qwen2(small_spec(tied=False), device="meta")
    plan = LoRAPlan(rank=4, alpha=8.0, targets=TARGETS[:2], quantize="nf4")
    add_lora(model, plan, dtype=torch.bfloat16)
    layers = [m for m in model.model.modules() if isinstance(m, FrozenLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(p.numel() * p.element_size() for m in layers for p in (m.weight, m.absmax))
    assert len(layers) == 21
    assert stored / weights == 4.5 / 8
    assert sum(isinstance(m, LoRALinear) for m in layers) == 6
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for m in layers for p in (m.weight, m.absmax))


def test_a_quantised_model_computes_with_the_dequantised_weights() -> None:
    from tests.unit.torch.peers import TOKENS
    from tests.unit.torch.test_torch_lora import network

    plan = LoRAPlan(rank=4, alpha=8.0, targets=TARGETS, quantize="nf4")
    model = network(small_spec(), plan, random_b=True)
    dense = network(small_spec(), LoRAPlan(rank=4, alpha=8.0, targets=TARGETS), random_b=True)
    rows = torch.tensor([TOKENS])
    apart = (model(rows) - dense(rows)).abs().max()
    packed = dict(model.named_modules())
    for path, layer in dense.named_modules():
        if isinstance(layer, FrozenLinear):
            layer.weight.data.copy_(FrozenLinear.dense_weight(packed[path]))
    torch.testing.assert_close(model(rows), dense(rows), rtol=0, atol=1e-5)
    assert apart > 1e-2
    for network_ in (model, dense):
        network_(rows).square().sum().backward()
    grads = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-4, atol=1e-4)
