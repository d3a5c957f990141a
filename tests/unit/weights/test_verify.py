"""verify accepts faithful conversions and catches planted faults, naming tensor or layer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen2kit.backend.registry import installed
from qwen2kit.errors import BackendError, ParityError
from qwen2kit.spec.model import MoESpec, RoPESpec
from qwen2kit.weights.checkpoint import Checkpoint, open_checkpoint
from qwen2kit.weights.convert import convert
from qwen2kit.weights.safetensors_read import SafetensorsFile
from qwen2kit.weights.safetensors_write import write_safetensors
from qwen2kit.weights.tensor import from_numpy
from qwen2kit.weights.verify import verify
from tests.tiny_checkpoint import write_tiny_checkpoint

NEEDS_BACKEND = pytest.mark.skipif(not installed(), reason="no backend installed")
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("verify") / "model"
    write_tiny_checkpoint(folder)
    return open_checkpoint(folder)


@NEEDS_BACKEND
def test_a_lossless_conversion_binds_the_tolerance(source: Checkpoint, tmp_path: Path) -> None:
    convert(source, tmp_path / "m.gguf", to="gguf")
    report = verify(source, open_checkpoint(tmp_path / "m.gguf"))
    assert report.lossless
    assert report.passed
    assert report.verdicts == {"equal": len(report.tensors)}
    assert len(report.logits) == 2 * len(installed()) - 1
    assert all(check.binding and check.delta.max_abs <= 1e-3 for check in report.logits)


@NEEDS_BACKEND
@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({"to": "hf", "dtype": "bfloat16"}, "rounded"),
        ({"to": "mlx", "quantize_bits": 4, "group_size": 32}, "quantised"),
        ({"to": "gguf", "gguf_type": "q8_0"}, "quantised"),
    ],
)
def test_a_lossy_conversion_reports_its_loss(
    source: Checkpoint, tmp_path: Path, options: dict[str, object], verdict: str
) -> None:
    out = tmp_path / ("out.gguf" if options["to"] == "gguf" else "out")
    convert(source, out, **options)  # type: ignore[arg-type]
    report = verify(source, open_checkpoint(out))
    assert not report.lossless
    assert verdict in report.verdicts
    loss = [check for check in report.logits if not check.binding]
    assert [check.first.split()[0] for check in loss] == ["source"] * len(installed())
    assert all(check.delta.max_abs > 1e-3 for check in loss)
    assert report.to_dict()["passed"] is True


def _with_fault(source: Checkpoint, folder: Path, change: float) -> Checkpoint:
    shutil.copytree(source.path, folder)
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: file.read(name).float32().copy() for name in file.names()}
    tensors[DOWN][3, 5] += np.float32(change)
    write_safetensors(path, [(name, from_numpy(value)) for name, value in tensors.items()])
    return open_checkpoint(folder)


def test_one_wrong_weight_is_found_and_named(source: Checkpoint, tmp_path: Path) -> None:
    target = _with_fault(source, tmp_path / "bad", 1e-6)
    with pytest.raises(ParityError, match=f"1 tensors .* worst: {DOWN}"):
        verify(source, target, backends=())


@NEEDS_BACKEND
def test_a_backend_that_computes_something_else_is_located_by_layer(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights pass; the logits of one side are made wrong behind the tensor check's back."""
    target = _with_fault(source, tmp_path / "bad", 1.0)
    monkeypatch.setattr(
        "qwen2kit.weights.verify.check_tensors", lambda a, b, progress: _equal(source)
    )
    with pytest.raises(ParityError, match="first difference: layer 1"):
        verify(source, target, backends=installed()[:1])
    report = verify(source, target, backends=installed()[:1], strict=False)
    layers = report.logits[0].layers
    assert layers is not None
    assert layers.relative[:2] == (0.0, 0.0)
    assert report.to_dict()["logits"][0]["layers"]["relative"]["layer 1"] > 1e-3


def _equal(source: Checkpoint) -> list[object]:
    from qwen2kit.weights.verify_tensors import check_tensors

    return list(check_tensors(source, source))


def test_specs_that_compute_differently_are_refused(source: Checkpoint) -> None:
    other = replace(source, spec=replace(source.spec, rope=RoPESpec(rope_theta=5e5)))
    with pytest.raises(ParityError, match="the two models differ in rope"):
        verify(source, other)
    bookkeeping = replace(source, spec=replace(source.spec, eos_token_id=3, initializer_range=0.1))
    assert verify(source, bookkeeping, backends=()).lossless


@NEEDS_BACKEND
def test_a_backend_that_cannot_run_the_model_is_reported(tmp_path: Path) -> None:
    moe = MoESpec(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
    )
    write_tiny_checkpoint(tmp_path / "moe", moe=moe, tied=False)
    checkpoint = open_checkpoint(tmp_path / "moe")
    from qwen2kit.backend.registry import get

    unable = [name for name in installed() if not get(name).capabilities().moe]
    report = verify(checkpoint, checkpoint)
    assert set(report.not_applicable) == set(unable)
    if unable:
        with pytest.raises(BackendError):
            verify(checkpoint, checkpoint, backends=unable)
