"""AWQ and GPTQ directories: dense values, exact MLX packing, conversion, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qwen2kit.errors import Qwen2KitError, WeightError
from qwen2kit.weights.affine import dequantize
from qwen2kit.weights.checkpoint import Checkpoint, open_checkpoint
from qwen2kit.weights.convert import convert
from qwen2kit.weights.packed_layout import PackedSource
from qwen2kit.weights.packing import read_packing
from qwen2kit.weights.safetensors_read import SafetensorsFile, SafetensorsSource
from qwen2kit.weights.verify import verify
from tests.conftest import small_spec
from tests.packed_checkpoint import Kind, edit_config, pack_layer, write_packed_checkpoint

AWQ = Kind(method="awq")
KINDS = {
    "awq": AWQ,
    "v1": Kind(),
    "v1-g_idx": Kind(order="plain"),
    "v2-8bit": Kind(version="gptq_v2", bits=8),
    "symmetric": Kind(symmetric=True),
    "2-bit": Kind(bits=2),
    "per-row": Kind(group_size=-1),
    "activation": Kind(order="activation"),
}
LAYER = "model.layers.1.mlp.down_proj"


def _open(tmp_path: Path, kind: Kind, **options: Any) -> tuple[Checkpoint, dict[str, Any]]:
    dense = write_packed_checkpoint(tmp_path / "in", kind, **options)
    return open_checkpoint(tmp_path / "in"), dense


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_layer_reads_as_the_formula_says(tmp_path: Path, kind: Kind) -> None:
    checkpoint, dense = _open(tmp_path, kind, zero_biases=kind.method == "gptq")
    assert checkpoint.format == kind.method
    assert len(dense) == 7 * checkpoint.spec.num_hidden_layers
    for name, expected in dense.items():
        assert np.array_equal(checkpoint.weights.read(name).float32(), expected)
    exact = kind.order != "activation"
    assert (checkpoint.quantization is not None) == exact
    assert bool(checkpoint.notes) == (not exact)
    assert (checkpoint.weights.affine(LAYER + ".weight") is not None) == exact
    assert checkpoint.weights.affine("model.embed_tokens.weight") is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    method=st.sampled_from(["awq", "gptq"]),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([-1, 16, 32, 48, 64, 128, 256]),
    order=st.sampled_from(["absent", "plain", "activation"]),
    out=st.integers(1, 6).map(lambda n: 16 * n),
    width=st.integers(1, 12).map(lambda n: 32 * n),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_group_size_is_dense_or_exactly_affine(
    method: str,
    version: str,
    bits: int,
    group_size: int,
    order: str,
    out: int,
    width: int,
    seed: int,
) -> None:
    if method == "awq":
        bits, order = 4, "absent"
    kind = Kind(method=method, version=version, bits=bits, group_size=group_size, order=order)
    stored, dense = pack_layer(kind, out, width, seed)
    packing = read_packing({"quantization_config": kind.config()})
    assert packing is not None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({f"{LAYER}.{part}": value for part, value in stored.items()}, path)
        source = PackedSource(small_spec(), SafetensorsSource([SafetensorsFile(path)]), packing)
        assert source.info(LAYER + ".weight").shape == (out, width)
        assert np.array_equal(source.read(LAYER + ".weight").float32(), dense)
        affine = source.affine(LAYER + ".weight")
        if affine is not None:
            assert np.array_equal(dequantize(affine).float32(), dense)
    size = width if group_size == -1 else min(group_size, width)
    regular = order != "activation" or size == width
    assert (affine is not None) == (regular and (size % 32 == 0 or size == width))


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("name", ["awq", "v1-g_idx", "activation"])
def test_both_backends_compute_what_the_dense_weights_say(
    tmp_path: Path, backend: str, name: str
) -> None:
    pytest.importorskip("torch" if backend == "torch" else "mlx.core")
    from qwen2kit.backend.loading import load_model
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.spec.reference import ReferenceModel
    from qwen2kit.weights.source import MemorySource
    from qwen2kit.weights.tensor import from_numpy

    checkpoint, dense = _open(tmp_path, KINDS[name])
    values = {name: checkpoint.weights.read(name) for name in checkpoint.weights.names()}
    values |= {name: from_numpy(value.astype(np.float32)) for name, value in dense.items()}
    tokens = [5, 17, 101, 260, 33, 33, 8, 199]
    expected = ReferenceModel(checkpoint.spec, MemorySource(values)).logits(tokens)
    plan = ExecutionPlan(device="cpu", dtype="float32", cpu_threads=1)
    model = load_model(tmp_path / "in", backend=backend, plan=plan).model
    assert np.abs(model.logits(tokens) - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["awq", "v2-8bit", "per-row"])
def test_conversion_to_mlx_keeps_the_codes(tmp_path: Path, name: str) -> None:
    source, _ = _open(tmp_path, KINDS[name], tied=False)
    report = convert(source, tmp_path / "mlx", to="mlx", dtype="float32")
    target = open_checkpoint(tmp_path / "mlx")
    assert report.quantization is not None
    assert target.weights.affine("lm_head.weight") is None
    for name in source.weights.names():
        ours, theirs = source.weights.affine(name), target.weights.affine(name)
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert np.array_equal(ours.packed.raw(), theirs.packed.raw())
    checks = verify(source, target, backends=[], tolerance=0).tensors
    assert {check.verdict for check in checks} == {"equal"}


@pytest.mark.parametrize("target", ["hf", "gguf"])
@pytest.mark.parametrize("name", ["awq", "activation"])
def test_conversion_to_dense_files(tmp_path: Path, name: str, target: Any) -> None:
    source, _ = _open(tmp_path, KINDS[name])
    out = tmp_path / ("out.gguf" if target == "gguf" else "out")
    assert convert(source, out, to=target).dtype == "float16"
    checks = verify(source, open_checkpoint(out), backends=[]).tensors
    assert {check.verdict for check in checks} <= {"equal", "rounded"}


def test_activation_order_becomes_dense_in_mlx_and_can_be_quantised_again(tmp_path: Path) -> None:
    source, _ = _open(tmp_path, KINDS["activation"])
    assert convert(source, tmp_path / "dense", to="mlx").quantization is None
    convert(source, tmp_path / "again", to="mlx", quantize_bits=8, group_size=32)
    again = open_checkpoint(tmp_path / "again").weights.affine(LAYER + ".weight")
    assert again is not None
    assert again.bits == 8


def test_a_merged_adapter_is_not_quantised_again_unasked(tmp_path: Path) -> None:
    from qwen2kit.adapters.directory import write_adapter
    from qwen2kit.adapters.merge import open_model
    from tests.tiny_adapter import random_adapter

    write_packed_checkpoint(tmp_path / "in", AWQ)
    base = open_checkpoint(tmp_path / "in")
    write_adapter(random_adapter(base.spec), tmp_path / "adapter", to="hf", force=False)
    source = open_model(str(tmp_path / "in"), str(tmp_path / "adapter"))
    assert convert(source, tmp_path / "out", to="mlx").quantization is None


def test_experts_of_an_awq_mixture_are_stacked_for_mlx(tmp_path: Path) -> None:
    from tests.unit.weights.test_mlx_layout import MOE

    source, dense = _open(tmp_path, AWQ, moe=MOE)
    convert(source, tmp_path / "mlx", to="mlx", dtype="float32")
    target = open_checkpoint(tmp_path / "mlx")
    assert any(".experts.3." in name for name in dense)
    for name, expected in dense.items():
        assert np.array_equal(target.weights.read(name).float32(), expected)


def test_padded_intermediate_size_comes_from_the_config(tmp_path: Path) -> None:
    """As in the released 72B files: the width is padded, config.json says so."""
    checkpoint, dense = _open(tmp_path, Kind(group_size=64), intermediate_size=192)
    assert checkpoint.weights.info(LAYER + ".weight").shape == (64, 192)
    assert np.array_equal(
        checkpoint.weights.read(LAYER + ".weight").float32(), dense[LAYER + ".weight"]
    )


@pytest.mark.parametrize(
    ("entry", "described"),
    [
        (
            {
                "bits": 4, "group_size": 128, "modules_to_not_convert": None,
                "quant_method": "awq", "version": "gemm", "zero_point": True,
            },
            "AWQ (gemm) 4-bit, groups of 128, asymmetric",
        ),
        (
            {
                "batch_size": 1, "bits": 8, "block_name_to_quantize": None, "damp_percent": 0.01,
                "dataset": None, "desc_act": False, "exllama_config": {"version": 1},
                "group_size": 128, "modules_in_block_to_quantize": None, "quant_method": "gptq",
                "sym": True, "true_sequential": True, "use_cuda_fp16": False, "use_exllama": True,
            },
            "GPTQ (gptq) 8-bit, groups of 128, symmetric",
        ),
        (
            {
                "bits": 4, "group_size": -1, "desc_act": True, "sym": False, "lm_head": False,
                "quant_method": "gptq", "checkpoint_format": "gptq_v2", "pack_dtype": "int32",
                "meta": {"quantizer": ["gptqmodel:4.0.0"], "static_groups": False},
            },
            "GPTQ (gptq_v2) 4-bit, one group per row, asymmetric, activation order",
        ),
    ],
)  # fmt: skip
def test_entries_as_autoawq_optimum_and_gptqmodel_write_them(
    entry: dict[str, Any], described: str
) -> None:
    packing = read_packing({"quantization_config": entry})
    assert packing is not None
    assert packing.describe() == described


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'.*only gemm"),
        ({"quant_method": "awq", "bits": 4, "version": "exllama"}, "exllama"),
        ({"quant_method": "awq", "bits": 4, "version": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "llm-awq"),
        ({"quant_method": "awq", "bits": 3}, "AWQ to 3 bits"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ to 3 bits.*2, 4, 8"),
        ({"quant_method": "gptq"}, "to None bits"),
        ({"quant_method": "gptq", "bits": True}, "to True bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "groups of 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "128"}, "positive integer or -1"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int64"}, "int64"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
    ],
)
def test_unread_variants_are_refused_in_one_line(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightError, match=message) as caught:
        read_packing({"quantization_config": entry})
    assert "\n" not in str(caught.value)
    assert "unquantised checkpoint" in str(caught.value)


def _short(part: str) -> Any:
    def damage(tensors: dict[str, Any], model: Path) -> None:
        tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER}.{part}"][:-1].copy()

    return damage


def _drop(part: str) -> Any:
    return lambda tensors, model: tensors.pop(f"{LAYER}.{part}")


def _bias(tensors: dict[str, Any], model: Path) -> None:
    tensors[f"{LAYER}.bias"] = np.ones(64, np.float16)


def _index(value: int) -> Any:
    def damage(tensors: dict[str, Any], model: Path) -> None:
        tensors[f"{LAYER}.g_idx"][3] = value

    return damage


def _wide(tensors: dict[str, Any], model: Path) -> None:
    tensors[f"{LAYER}.qweight"] = tensors[f"{LAYER}.qweight"].astype(np.int64)


def _float(tensors: dict[str, Any], model: Path) -> None:
    tensors[f"{LAYER}.scales"] = tensors[f"{LAYER}.scales"].astype(np.int32)


def _both(tensors: dict[str, Any], model: Path) -> None:
    tensors[f"{LAYER}.weight"] = np.zeros((64, 160), np.float16)


def _config(**changes: Any) -> Any:
    def damage(tensors: dict[str, Any], model: Path) -> None:
        edit_config(model, **changes)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((_short(part), "down_proj.*not GPTQ") for part in ("qweight", "qzeros", "scales")),
        (_short("g_idx"), "down_proj.*not GPTQ"),
        *((_drop(part), f"lacks its {part}") for part in ("qzeros", "scales")),
        (_drop("qweight"), "do not fit config.json"),
        (_bias, "unexpected: .*down_proj.bias"),
        (_index(-1), "g_idx outside its 5 groups"),
        (_index(5), "g_idx outside its 5 groups"),
        (_wide, "not GPTQ"),
        (_float, "not GPTQ"),
        (_both, "both packed and dense"),
        (_config(intermediate_size=192), "wrong shape"),
        (_config(quantization_config=AWQ.config()), "not AWQ"),
        (_config(quantization_config=Kind(bits=8).config()), "not GPTQ .gptq. 8-bit"),
        (_config(quantization_config=Kind(group_size=64).config()), "groups of 64"),
    ],
)
def test_damage_is_one_line_that_names_the_layer(tmp_path: Path, damage: Any, message: str) -> None:
    write_packed_checkpoint(tmp_path, Kind(order="plain"))
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Qwen2KitError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_announced_but_absent_packing(tmp_path: Path) -> None:
    from tests.tiny_checkpoint import write_tiny_checkpoint

    write_tiny_checkpoint(tmp_path)
    edit_config(tmp_path, quantization_config=AWQ.config())
    with pytest.raises(WeightError, match="announces AWQ, but the files hold no packed layer"):
        open_checkpoint(tmp_path)


def test_inspect_names_the_encoding(tmp_path: Path) -> None:
    from qwen2kit.cli.inspect import describe_checkpoint

    checkpoint, _ = _open(tmp_path, KINDS["activation"])
    document = json.loads(json.dumps(describe_checkpoint(checkpoint)))
    assert document["format"] == "gptq"
    assert document["packing"] == "GPTQ (gptq) 4-bit, groups of 32, asymmetric, activation order"
    assert "21 of 21 packed layers" in document["notes"][0]
