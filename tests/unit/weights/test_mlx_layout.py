"""MLX directories: names, experts, mixed precision, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.errors import ConfigError, WeightError
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.model import MoESpec
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.spec.schema import schema
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.convert import convert
from qwen2kit.weights.quantization import Quantization, read_quantization
from qwen2kit.weights.safetensors_read import SafetensorsFile
from qwen2kit.weights.safetensors_write import write_safetensors
from tests.tiny_checkpoint import write_tiny_checkpoint

MOE = MoESpec(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=96,
)
TOKENS = [5, 17, 101, 260, 33, 33, 8, 199]


@pytest.mark.parametrize("bits", [None, 4])
def test_experts_are_stacked_as_mlx_lm_wants_them_and_come_back(
    tmp_path: Path, bits: int | None
) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    write_tiny_checkpoint(tmp_path / "in", tied=False, moe=MOE)
    source = open_checkpoint(tmp_path / "in")
    convert(source, tmp_path / "mlx", to="mlx", quantize_bits=bits, group_size=32)
    stored = SafetensorsFile(tmp_path / "mlx/model.safetensors")
    assert stored.info("model.layers.1.mlp.switch_mlp.up_proj.weight").shape[:2] == (4, 32)
    target = open_checkpoint(tmp_path / "mlx")
    assert set(target.weights.names()) == {param.name for param in schema(source.spec)}
    if bits is None:
        for param in schema(source.spec):
            got = target.weights.read(param.name).float32()
            assert np.array_equal(got, source.weights.read(param.name).float32())

    model, _ = utils.load_model(tmp_path / "mlx")
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array([TOKENS])))[0]
    expected = ReferenceModel(target.spec, target.weights).logits(TOKENS)
    assert np.abs(logits - expected).max() < 1e-3

    convert(target, tmp_path / "hf", to="hf")
    back = open_checkpoint(tmp_path / "hf")
    for param in schema(source.spec):
        got = back.weights.read(param.name).float32()
        assert np.array_equal(got, target.weights.read(param.name).float32())


def test_mixed_precision_made_by_mlx_lm_reads_as_mlx_dequantises_it(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    write_tiny_checkpoint(tmp_path / "in")

    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        if "down_proj" in path:
            return {"bits": 8, "group_size": 32, "mode": "affine"}
        return "q_proj" not in path

    mlx_lm.convert(
        str(tmp_path / "in"),
        str(tmp_path / "mlx"),
        quantize=True,
        q_bits=4,
        q_group_size=32,
        quant_predicate=predicate,
    )
    checkpoint = open_checkpoint(tmp_path / "mlx")
    arrays = mx.load(str(tmp_path / "mlx/model.safetensors"))
    seen = set()
    for param in schema(checkpoint.spec):
        packed = checkpoint.weights.affine(param.name)
        got = checkpoint.weights.read(param.name).float32()
        seen.add(None if packed is None else packed.bits)
        if packed is None:
            expected = arrays[param.name].astype(mx.float32)
        else:
            module = param.name.removesuffix(".weight")
            scales, biases = (
                arrays[f"{module}.{p}"].astype(mx.float32) for p in ("scales", "biases")
            )
            expected = mx.dequantize(
                arrays[param.name], scales, biases, group_size=32, bits=packed.bits
            )
        assert np.array_equal(got, np.array(expected)), param.name
    assert seen == {None, 4, 8}
    assert checkpoint.weights.affine("model.layers.0.self_attn.q_proj.weight") is None


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_tiny_checkpoint(tmp_path / "in")
    convert(
        open_checkpoint(tmp_path / "in"), tmp_path / "m", to="mlx", quantize_bits=4, group_size=32
    )
    return tmp_path / "m"


def test_wrong_bits_in_the_config_are_noticed(packed: Path) -> None:
    _edit_config(packed, quantization={"bits": 8, "group_size": 32})
    with pytest.raises(WeightError, match="wrong shape"):
        open_checkpoint(packed)


def test_missing_settings_and_missing_parts_are_noticed(packed: Path) -> None:
    path = packed / "model.safetensors"
    file = SafetensorsFile(path)
    kept = [(n, file.read(n)) for n in file.names() if n != "model.layers.1.mlp.up_proj.biases"]
    write_safetensors(path, [(n, t) for n, t in kept], metadata={"format": "mlx"})
    with pytest.raises(WeightError, match=r"'model.layers.1.mlp.up_proj' lacks"):
        open_checkpoint(packed)
    _edit_config(packed, quantization=None, quantization_config=None)
    with pytest.raises(WeightError, match=r"lacks|has no quantization"):
        open_checkpoint(packed)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mode 'mxfp4'"),
        ({"bits": 5, "group_size": 32}, "bits must be one of"),
        ({"bits": 4, "group_size": 48}, "group size must be one of"),
        ({"bits": "4", "group_size": 32}, "needs integers"),
        ({"group_size": 32}, "needs integers"),
        ({"bits": 4, "group_size": 32, "model.norm": "x"}, "unknown key 'model.norm'"),
        ({"bits": 4, "group_size": 32, "a": {"mode": "nvfp4"}}, "mode 'nvfp4'"),
        ([4, 32], "must be an object"),
    ],
)
def test_quantization_entries_are_read_strictly(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_quantization({"quantization": entry})


def test_overrides_are_per_module() -> None:
    entry = {"bits": 4, "group_size": 64, "a": False, "b": {"bits": 8}, "c": True}
    settings = read_quantization({"quantization": entry})
    assert settings == Quantization(4, 64, {"a": None, "b": (8, 64)})
    assert [settings.of(m) for m in "abcd"] == [None, (8, 64), (4, 64), (4, 64)]
    assert read_quantization({}) is None


def test_unquantised_mlx_files_are_recognised(tmp_path: Path) -> None:
    spec = write_tiny_checkpoint(tmp_path / "in")
    convert(open_checkpoint(tmp_path / "in"), tmp_path / "out", to="mlx", dtype="bfloat16")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.format, checkpoint.dtype, checkpoint.spec) == ("mlx", "bfloat16", spec)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == to_hf_config(spec, dtype="bfloat16")
