"""mlx-lm's adapter layout: transposes, one scale, and mlx-lm itself as the reader."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen2kit.adapters.directory import convert_adapter, open_adapter, write_adapter
from qwen2kit.adapters.merge import AdaptedSource
from qwen2kit.errors import ConfigError
from qwen2kit.spec.hf import from_hf_config
from qwen2kit.spec.reference import ReferenceModel
from tests.conftest import random_weights, small_spec
from tests.tiny_adapter import TARGETS, random_adapter
from tests.tiny_checkpoint import write_tiny_checkpoint

TOKENS = [5, 17, 3, 3, 198, 0, 42, 77]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank", [3, 64], ids=["r=3", "r=d"])
def test_there_and_back_is_exact(dtype: str, rank: int, tmp_path: Path) -> None:
    adapter = random_adapter(small_spec(), rank=rank, scale=1.25, base_model="org/base")
    write_adapter(adapter, tmp_path / "peft", to="hf", dtype=dtype, force=False)  # type: ignore[arg-type]
    first = open_adapter(tmp_path / "peft")
    report = convert_adapter(first, tmp_path / "mlx", to="mlx", force=False)
    assert (report.source_format, report.format, report.modules) == ("hf", "mlx", 21)
    assert report.dtype == dtype
    turned = open_adapter(tmp_path / "mlx")
    assert turned.format == "mlx"
    convert_adapter(turned, tmp_path / "again", to="hf", force=False)
    second = open_adapter(tmp_path / "again")
    assert list(first.modules) == list(second.modules)
    assert second.base_model == "org/base"
    for path, update in first.modules.items():
        for reading in (turned.modules[path], second.modules[path]):
            assert bytes(reading.a.data) == bytes(update.a.data)
            assert bytes(reading.b.data) == bytes(update.b.data)
            assert reading.scale == update.scale == 1.25
    names = [file.read_bytes() for file in sorted((tmp_path / "peft").iterdir())]
    assert names[1] == (tmp_path / "again" / "adapter_model.safetensors").read_bytes()


def test_the_file_has_the_transposes(tmp_path: Path) -> None:
    adapter = random_adapter(small_spec(), rank=3)
    write_adapter(adapter, tmp_path / "mlx", to="mlx", force=False)
    stored = load_file(tmp_path / "mlx" / "adapters.safetensors")
    path, update = next(iter(adapter.modules.items()))
    assert np.array_equal(stored[f"{path}.lora_a"], update.a.float32().T)
    assert np.array_equal(stored[f"{path}.lora_b"], update.b.float32().T)
    parameters = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert parameters["lora_parameters"]["scale"] == 2.0


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj", "down_proj")], ids=["all", "two"])
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)], ids=["every layer", "one layer"])
def test_mlx_lm_loads_it(targets: tuple[str, ...], layers: tuple[int, ...], tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    spec = write_tiny_checkpoint(tmp_path / "base")
    full = random_adapter(spec, targets=targets)
    kept = {p: u for p, u in full.modules.items() if int(p.split(".")[2]) in layers}
    adapter = replace(full, modules=kept)
    write_adapter(adapter, tmp_path / "mlx", to="mlx", force=False)
    model, _ = mlx_lm.load_model(tmp_path / "base")
    model = mlx_lm.load_adapters(model, str(tmp_path / "mlx"))
    model.eval()
    with mx.stream(mx.cpu):
        theirs = np.array(model(mx.array([TOKENS]))[0])
    weights = AdaptedSource(random_weights(spec), adapter)
    reference = ReferenceModel(spec, weights).logits(TOKENS)
    assert np.abs(theirs - reference).max() < 2e-5 * np.abs(reference).max()


def test_an_adapter_of_mlx_lm_is_read(tmp_path: Path) -> None:
    """Factors and config as mlx-lm's own trainer saves them: whole settings, last layers only."""
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    from mlx.utils import tree_flatten

    spec = write_tiny_checkpoint(tmp_path / "base")
    model, _ = mlx_lm.load_model(tmp_path / "base")
    model.freeze()
    parameters = {"rank": 5, "scale": 20.0, "dropout": 0.0}
    tuner.linear_to_lora_layers(model, 2, parameters)
    random = np.random.default_rng(0)
    factors = {
        name: mx.array(random.standard_normal(value.shape).astype(np.float32) * 0.02)
        for name, value in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(factors.items()), strict=False)
    (tmp_path / "a").mkdir()
    mx.save_safetensors(str(tmp_path / "a" / "adapters.safetensors"), factors)
    settings = {
        "fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters,
        "model": str(tmp_path / "base"), "iters": 100, "train": True, "seed": 0,
    }  # fmt: skip
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    adapter = open_adapter(tmp_path / "a")
    adapter.check_fits(spec)
    assert adapter.base_model == str(tmp_path / "base")
    assert {int(path.split(".")[2]) for path in adapter.modules} == {1, 2}
    model.eval()
    with mx.stream(mx.cpu):
        theirs = np.array(model(mx.array([TOKENS]))[0])
    reference = ReferenceModel(spec, AdaptedSource(random_weights(spec), adapter)).logits(TOKENS)
    assert np.abs(theirs - reference).max() < 2e-5 * np.abs(reference).max()
    assert from_hf_config(json.loads((tmp_path / "base/config.json").read_text())) == spec


def test_output_is_refused_where_it_would_destroy(tmp_path: Path) -> None:
    adapter = random_adapter(small_spec())
    write_adapter(adapter, tmp_path / "a", to="hf", force=False)
    source = open_adapter(tmp_path / "a")
    with pytest.raises(ConfigError, match="is or contains the source"):
        convert_adapter(source, tmp_path / "a", to="mlx", force=True)
    with pytest.raises(ConfigError, match="is or contains the source"):
        convert_adapter(source, tmp_path, to="mlx", force=True)
    write_adapter(adapter, tmp_path / "b", to="hf", force=False)
    with pytest.raises(ConfigError, match="use --force to replace"):
        convert_adapter(source, tmp_path / "b", to="mlx", force=False)
    convert_adapter(source, tmp_path / "b", to="mlx", force=True)
    assert open_adapter(tmp_path / "b").format == "mlx"
    with pytest.raises(ConfigError, match="dtype must be one of"):
        write_adapter(adapter, tmp_path / "c", to="hf", dtype="int8", force=False)
