"""Reading a model with an adapter merged in, from every kind of base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen2kit.adapters.directory import write_adapter
from qwen2kit.adapters.export import export_adapter
from qwen2kit.adapters.lora import factor_names, lora_scale
from qwen2kit.adapters.merge import AdaptedSource, open_model, with_adapter
from qwen2kit.config.tree import AdapterConfig
from qwen2kit.errors import WeightError
from qwen2kit.weights.affine import dequantize
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.convert import convert
from qwen2kit.weights.locate import latest_run, locate
from qwen2kit.weights.source import WeightSource
from qwen2kit.weights.verify import verify
from tests.conftest import random_weights, small_spec
from tests.tiny_adapter import random_adapter
from tests.tiny_checkpoint import write_tiny_checkpoint


def expected(base: WeightSource, adapter: object, name: str) -> np.ndarray:
    """``W + scale * B @ A`` in float64."""
    dense = base.read(name).float32().astype(np.float64)
    update = adapter.modules.get(name.removesuffix(".weight"))  # type: ignore[attr-defined]
    if update is None:
        return dense
    b, a = update.b.float32().astype(np.float64), update.a.float32().astype(np.float64)
    return dense + update.scale * (b @ a)


def test_values_names_and_dtypes() -> None:
    spec = small_spec()
    base, adapter = random_weights(spec), random_adapter(spec, rank=64, targets=("o_proj",))
    merged = AdaptedSource(base, adapter)
    assert merged.names() == base.names()
    changed = 0
    for name in base.names():
        value = merged.read(name)
        assert (value.dtype, value.shape) == (merged.info(name).dtype, merged.info(name).shape)
        np.testing.assert_allclose(value.float32(), expected(base, adapter, name), atol=1e-6)
        changed += not np.array_equal(value.float32(), base.read(name).float32())
        assert (merged.update(name) is None) == ("o_proj" not in name)
    assert changed == spec.num_hidden_layers


def test_the_sum_is_formed_in_float32_whatever_the_base_is_stored_in(tmp_path: Path) -> None:
    """A bfloat16 base would swallow updates this small if the sum were rounded to its dtype."""
    write_tiny_checkpoint(tmp_path / "base")
    convert(open_checkpoint(tmp_path / "base"), tmp_path / "bf16", to="hf", dtype="bfloat16")
    base = open_checkpoint(tmp_path / "bf16")
    adapter = random_adapter(base.spec, size=1e-3, targets=("q_proj",))
    merged = with_adapter(base, adapter)
    name = f"{next(iter(adapter.modules))}.weight"
    assert base.weights.info(name).dtype == "bfloat16"
    assert merged.weights.info(name).dtype == "float32"
    delta = merged.weights.read(name).float32() - base.weights.read(name).float32()
    target = expected(base.weights, adapter, name) - base.weights.read(name).float32()
    np.testing.assert_allclose(delta, target, atol=2e-8)
    assert merged.dtype == "bfloat16"


@pytest.mark.parametrize("kind", ["gguf", "mlx 4-bit"])
def test_bases_of_other_formats(kind: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "base", hidden_size=64, intermediate_size=192)
    hf = open_checkpoint(tmp_path / "base")
    if kind == "gguf":
        path = tmp_path / "base.gguf"
        convert(hf, path, to="gguf", gguf_type="q8_0")
    else:
        path = tmp_path / "mlx"
        convert(hf, path, to="mlx", quantize_bits=4)
    base = open_checkpoint(path)
    adapter = random_adapter(base.spec, targets=("gate_proj", "v_proj"))
    merged = with_adapter(base, adapter)
    for name in base.weights.names():
        value = merged.weights.read(name).float32()
        np.testing.assert_allclose(value, expected(base.weights, adapter, name), atol=1e-6)
        packed = merged.weights.affine(name)
        if packed is not None:
            assert np.array_equal(dequantize(packed).float32(), value)
    adapted = {f"{path}.weight" for path in adapter.modules}
    packed_names = {n for n in base.weights.names() if base.weights.affine(n) is not None}
    assert {n for n in packed_names if merged.weights.affine(n) is None} == packed_names & adapted
    convert(merged, tmp_path / "out", to="hf", dtype="float32")
    report = verify(merged, open_checkpoint(tmp_path / "out"), backends=[])
    assert report.lossless


def test_an_adapter_opens_on_the_base_it_names(tmp_path: Path) -> None:
    spec = write_tiny_checkpoint(tmp_path / "base")
    adapter = random_adapter(spec, base_model=str(tmp_path / "base"))
    write_adapter(adapter, tmp_path / "a", to="hf", force=False)
    alone = open_model(str(tmp_path / "a"))
    named = open_model(str(tmp_path / "base"), str(tmp_path / "a"))
    assert alone.adapter == named.adapter == tmp_path / "a"
    assert alone.path == named.path == tmp_path / "base"
    for name in alone.weights.names():
        assert bytes(alone.weights.read(name).data) == bytes(named.weights.read(name).data)
    assert alone.tokenizer().vocab_size == open_checkpoint(tmp_path / "base").tokenizer().vocab_size


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    spec = write_tiny_checkpoint(tmp_path / "base")
    adapter = random_adapter(spec)
    write_adapter(adapter, tmp_path / "a", to="hf", force=False)
    with pytest.raises(WeightError, match="does not say which model it belongs to; name the base"):
        open_model(str(tmp_path / "a"))
    gone = replace(adapter, base_model=str(tmp_path / "gone"))
    write_adapter(gone, tmp_path / "a", to="hf", force=True)
    with pytest.raises(WeightError, match=r"its base model is not here: .*BASE --adapter"):
        open_model(str(tmp_path / "a"))
    open_model(str(tmp_path / "base"), str(tmp_path / "a"))
    itself = replace(adapter, base_model=str(tmp_path / "a"))
    write_adapter(itself, tmp_path / "a", to="hf", force=True)
    with pytest.raises(WeightError, match="is an adapter itself; merge that first"):
        open_model(str(tmp_path / "a"))


def test_adapters_do_not_stack(tmp_path: Path) -> None:
    spec = write_tiny_checkpoint(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    once = with_adapter(base, random_adapter(spec))
    with pytest.raises(WeightError, match="is an adapter itself; merge it first"):
        with_adapter(once, random_adapter(spec))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_run_exports_its_adapter(rslora: bool, tmp_path: Path) -> None:
    spec = write_tiny_checkpoint(tmp_path / "base")
    config = AdapterConfig(rank=4, alpha=6.0, dropout=0.1, targets=("q_proj",), rslora=rslora)
    scale = lora_scale(4, 6.0, rslora=rslora)
    adapter = random_adapter(spec, targets=("q_proj",), scale=scale)
    factors = [
        (name, factor)
        for path, update in adapter.modules.items()
        for name, factor in zip(factor_names(path), (update.a, update.b), strict=True)
    ]
    run = tmp_path / "runs" / "lora"
    run.mkdir(parents=True)
    base = str(tmp_path / "base")
    for _ in range(2):  # a resumed run writes it again
        export_adapter(run / "model", config, factors, base_model=base, dtype="float32")
    assert locate(str(run)) == run / "model"
    assert latest_run(tmp_path / "runs") == run
    opened = open_model(str(run))
    assert opened.adapter == run / "model"
    weights = AdaptedSource(open_checkpoint(tmp_path / "base").weights, adapter)
    for name in weights.names():
        assert bytes(opened.weights.read(name).data) == bytes(weights.read(name).data)
