"""AWQ and GPTQ against mlx-lm's and GPTQModel's own reading of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.convert import convert
from tests.packed_checkpoint import Kind, write_packed_checkpoint

AWQ = Kind(method="awq", group_size=64)
SPEC = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192}
TOKENS = [5, 17, 101, 260, 33, 33, 8, 199]


def _mlx_lm(path: Path) -> Any:
    pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    return utils.load_model(path)[0]


def test_awq_arrays_are_those_of_mlx_lms_transform(tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, AWQ, **SPEC)
    model = _mlx_lm(tmp_path)
    weights = open_checkpoint(tmp_path).weights
    for layer, module in enumerate(model.model.layers):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            theirs = module
            for step in part.split("."):
                theirs = theirs[step]
            ours = weights.affine(f"model.layers.{layer}.{part}.weight")
            assert ours is not None
            assert (ours.bits, ours.group_size) == (theirs.bits, theirs.group_size)
            assert np.array_equal(ours.packed.raw(), np.array(theirs.weight))
            assert np.array_equal(ours.scales.float32(), np.array(theirs.scales, np.float32))
            rounded = ours.biases.astype("float16").raw()
            assert np.array_equal(rounded, np.array(theirs.biases))


def test_awq_logits_equal_mlx_lms(tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path, AWQ, **SPEC)
    model = _mlx_lm(tmp_path)
    import mlx.core as mx

    from qwen2kit.backend.loading import load_model
    from qwen2kit.backend.plan import ExecutionPlan

    model.set_dtype(mx.float32)
    theirs = np.array(model(mx.array([TOKENS])))[0]
    plan = ExecutionPlan(device="cpu", dtype="float32", cpu_threads=1)
    ours = load_model(tmp_path, backend="mlx", plan=plan).model.logits(TOKENS)
    # mlx-lm rounds the biases to float16
    assert np.abs(ours - theirs).max() < 5e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("kind", [AWQ, Kind(group_size=64), Kind(bits=8, group_size=-1)])
def test_mlx_lm_loads_the_conversion(tmp_path: Path, kind: Kind) -> None:
    write_packed_checkpoint(tmp_path / "in", kind, **SPEC)
    source = open_checkpoint(tmp_path / "in")
    convert(source, tmp_path / "out", to="mlx", dtype="float32")
    model = _mlx_lm(tmp_path / "out")
    import mlx.core as mx

    from qwen2kit.spec.reference import ReferenceModel

    logits = np.array(model(mx.array([TOKENS])))[0]
    assert np.abs(logits - ReferenceModel(source.spec, source.weights).logits(TOKENS)).max() < 1e-3


@pytest.mark.parametrize("order", ["plain", "activation"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_gptq_is_read_as_gptqmodel_reads_it(
    tmp_path: Path, order: str, version: str, bits: int, group_size: int
) -> None:
    torch = pytest.importorskip("torch")
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    kind = Kind(bits=bits, group_size=group_size, version=version, order=order)
    write_packed_checkpoint(tmp_path, kind, **SPEC)
    weights = open_checkpoint(tmp_path).weights
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        out, width = weights.info(f"{name}.weight").shape
        module = linear.TorchLinear(
            bits=bits, group_size=group_size, sym=False, desc_act=order == "activation",
            in_features=width, out_features=out,
        )  # fmt: skip
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            getattr(module, part).data = torch.from_numpy(tensors[f"{name}.{part}"].copy())
        if version == "gptq":
            convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
        module.post_init()
        theirs = module.dequantize_weight().T.float().numpy()
        assert np.array_equal(weights.read(f"{name}.weight").astype("float16").float32(), theirs)


def test_gptq_zero_points_of_nought_survive_gptqmodels_v1_files(tmp_path: Path) -> None:
    """GPTQModel subtracts one from the packed word, so nought borrows from its neighbour."""
    torch = pytest.importorskip("torch")
    model = pytest.importorskip("gptqmodel.utils.model")
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    from safetensors.numpy import save_file

    write_packed_checkpoint(tmp_path, Kind(version="gptq_v2"))
    path = tmp_path / "model.safetensors"
    tensors, name = load_file(path), "model.layers.1.mlp.up_proj"
    tensors[f"{name}.qzeros"] &= np.int32(0x0FF0F0F0)
    save_file(tensors, path)
    second = open_checkpoint(tmp_path).weights.read(f"{name}.weight").float32().copy()
    module = linear.TorchLinear(
        bits=4, group_size=32, sym=False, desc_act=False, in_features=64, out_features=160
    )
    module.qzeros.data = torch.from_numpy(tensors[f"{name}.qzeros"].copy())
    model.convert_gptq_v2_to_v1_format_module(
        module, type("Settings", (), {"bits": 4, "pack_dtype": torch.int32})()
    )
    others = {key: value for key, value in tensors.items() if not key.endswith("qzeros")}
    write_packed_checkpoint(tmp_path, Kind(version="gptq"))
    zeros = {key: value for key, value in load_file(path).items() if key.endswith("qzeros")}
    save_file(others | zeros | {f"{name}.qzeros": module.qzeros.numpy()}, path)
    first = open_checkpoint(tmp_path).weights.read(f"{name}.weight").float32()
    assert np.array_equal(first, second)


def test_awq_is_read_as_gptqmodel_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    awq = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    write_packed_checkpoint(tmp_path, AWQ, **SPEC)
    weights = open_checkpoint(tmp_path).weights
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        parts = (torch.from_numpy(tensors[f"{name}.{p}"]) for p in ("qweight", "qzeros", "scales"))
        theirs = awq.dequantize_gemm(*parts, 4, 64).T.float().numpy()
        assert np.array_equal(weights.read(f"{name}.weight").astype("float16").float32(), theirs)


def test_mlx_lm_is_no_judge_of_packed_files(tmp_path: Path) -> None:
    peer = pytest.importorskip("qwen2kit_mlx.peer_mlx_lm").MLXLMPeer()
    write_packed_checkpoint(tmp_path / "in", AWQ, **SPEC)
    source = open_checkpoint(tmp_path / "in")
    convert(source, tmp_path / "out", to="mlx")
    assert "rounds AWQ's zero points" in peer.refuses(source, "float32")
    assert peer.refuses(open_checkpoint(tmp_path / "out"), "float32") == ""
