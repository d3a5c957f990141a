"""Adapters beside MLX weights, dense and packed: equal to merged ones, and to mlx-lm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit.adapters.directory import open_adapter, write_adapter  # noqa: E402
from qwen2kit.adapters.lora import Adapter  # noqa: E402
from qwen2kit.adapters.merge import AdaptedSource  # noqa: E402
from qwen2kit.backend.protocol import ScoreRequest  # noqa: E402
from qwen2kit.engine.generate import generate  # noqa: E402
from qwen2kit.generate.sampling import Sampling  # noqa: E402
from qwen2kit.spec.model import ModelSpec  # noqa: E402
from qwen2kit.spec.reference import ReferenceModel  # noqa: E402
from qwen2kit.spec.schema import schema  # noqa: E402
from qwen2kit.weights.source import MemorySource  # noqa: E402
from qwen2kit_mlx.linear import Affine  # noqa: E402
from qwen2kit_mlx.lora import LoRA  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.tiny_adapter import TARGETS, random_adapter  # noqa: E402
from tests.unit.mlx.setup_mlx import KERNELS, PackedSource, model  # noqa: E402

TOKENS = np.random.default_rng(7).integers(0, 199, 31).tolist()
TARGET_SETS = {
    "all": TARGETS,
    "q and up": ("q_proj", "up_proj"),
    "o and down": ("o_proj", "down_proj"),
}


def packed_base(spec: ModelSpec, bits: int | None) -> PackedSource:
    formats = {p.name: (bits, 32) for p in schema(spec) if p.quantizable} if bits else {}
    return PackedSource(random_weights(spec), formats)


def merged(base: PackedSource, adapter: Adapter) -> MemorySource:
    """The dense float32 sum of the (dequantised) base and the adapter."""
    source = AdaptedSource(base, adapter)
    return MemorySource({name: source.read(name) for name in source.names()})


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("targets", TARGET_SETS)
def test_logits_are_those_of_the_merged_model(targets: str, bits: int | None, kernels: str) -> None:
    spec = small_spec()
    base = packed_base(spec, bits)
    adapter = random_adapter(spec, targets=TARGET_SETS[targets])
    found = model(spec, AdaptedSource(base, adapter), kernels).logits(TOKENS)
    expected = ReferenceModel(spec, merged(base, adapter)).logits(TOKENS)
    assert np.abs(found - expected).max() < 5e-5 * np.abs(expected).max()
    plain = model(spec, base, kernels).logits(TOKENS)
    assert np.abs(found - plain).max() > 1e-2


@pytest.mark.parametrize("kernels", KERNELS)
def test_scores_and_text_are_those_of_the_merged_model(kernels: str) -> None:
    spec = small_spec(tied=False)
    base, adapter = packed_base(spec, 4), random_adapter(spec, rank=64, scale=0.5)
    beside = model(spec, AdaptedSource(base, adapter), kernels)
    whole = model(spec, merged(base, adapter), kernels)
    requests = [ScoreRequest(tuple(TOKENS[:n]), tuple(TOKENS[n : n + 3])) for n in (4, 9)]
    for (_, one), (_, two) in zip(beside.score(requests), whole.score(requests), strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
        assert one.is_greedy == two.is_greedy
    for sampling in (
        Sampling(max_new_tokens=20),
        Sampling(max_new_tokens=20, temperature=0.8, seed=1),
    ):
        texts = [
            [e.token for e in generate(m, [TOKENS, TOKENS[:5]], sampling)] for m in (beside, whole)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_base_stays_packed(kernels: str) -> None:
    spec = small_spec()
    beside = model(spec, AdaptedSource(packed_base(spec, 4), random_adapter(spec)), kernels)
    layer = beside._ready().params.layers[0]
    for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
        assert isinstance(matrix, LoRA)
        parts = getattr(matrix.base, "parts", (matrix.base,))
        assert all(isinstance(part, Affine) for part in parts)


def test_layers_without_an_adapter_are_as_they_were() -> None:
    spec = small_spec()
    adapter = random_adapter(spec, targets=("o_proj",))
    beside = model(spec, AdaptedSource(packed_base(spec, None), adapter))
    layer = beside._ready().params.layers[0]
    assert isinstance(layer.o, LoRA)
    assert not any(isinstance(m, LoRA) for m in (layer.qkv, layer.gate_up, layer.down))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bits", [None, 4])
def test_the_export_is_merged(bits: int | None, kernels: str) -> None:
    spec = small_spec()
    base, adapter = packed_base(spec, bits), random_adapter(spec)
    source = AdaptedSource(base, adapter)
    names = []
    for name, tensor in model(spec, source, kernels).export():
        names.append(name)
        np.testing.assert_allclose(tensor.float32(), source.read(name).float32(), atol=2e-6)
    assert names == [param.name for param in schema(spec)]


def test_bytes_read_include_the_factors() -> None:
    spec = small_spec()
    adapter = random_adapter(spec)
    base = random_weights(spec)
    plain, beside = (
        model(spec, base).load(source) for source in (base, AdaptedSource(base, adapter))
    )
    factors = sum(u.a.nbytes + u.b.nbytes for u in adapter.modules.values())
    assert beside.bytes == plain.bytes + factors
    assert beside.tensors == plain.tensors


def test_it_computes_in_half_precision() -> None:
    spec = small_spec()
    adapter = random_adapter(spec)
    source = AdaptedSource(packed_base(spec, 4), adapter)
    exact = model(spec, source).logits(TOKENS)
    half = model(spec, source, dtype=mx.bfloat16).logits(TOKENS)
    assert np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("layout", ["hf", "mlx"])
@pytest.mark.parametrize("bits", [None, 4])
def test_mlx_lm_computes_the_same_on_a_packed_base(
    bits: int | None, layout: str, tmp_path: Path
) -> None:
    qwen2 = pytest.importorskip("mlx_lm.models.qwen2")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    import mlx.nn as nn

    from qwen2kit.spec.hf import to_hf_config

    spec = small_spec()
    theirs = qwen2.Model(qwen2.ModelArgs.from_dict(to_hf_config(spec, dtype="float32")))
    weights = random_weights(spec)
    theirs.load_weights([(n, mx.array(weights.read(n).raw())) for n in weights.names()])
    if bits is not None:
        nn.quantize(theirs, group_size=32, bits=bits)
    full = random_adapter(spec, targets=("q_proj", "v_proj", "down_proj"))
    kept = {path: u for path, u in full.modules.items() if ".layers.0." not in path}
    write_adapter(replace(full, modules=kept), tmp_path / "a", to=layout, force=False)  # type: ignore[arg-type]
    write_adapter(open_adapter(tmp_path / "a"), tmp_path / "mlx", to="mlx", force=False)
    tuner.load_adapters(theirs, str(tmp_path / "mlx")).eval()
    with mx.stream(mx.cpu):
        expected = np.array(theirs(mx.array([TOKENS]))[0])
    source = AdaptedSource(packed_base(spec, bits), open_adapter(tmp_path / "a"))
    found = model(spec, source).logits(TOKENS)
    assert np.abs(found - expected).max() < 5e-5 * np.abs(expected).max()
