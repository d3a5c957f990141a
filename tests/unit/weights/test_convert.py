"""Conversions of a small random model, loaded by transformers and mlx-lm with equal logits."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.errors import ConfigError, WeightError
from qwen2kit.spec.model import LinearScaling, RoPESpec, YarnScaling
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.spec.schema import schema
from qwen2kit.weights.checkpoint import Checkpoint, Format, open_checkpoint
from qwen2kit.weights.convert import RECORD_NAME, convert
from qwen2kit.weights.gguf_write import GgufType
from qwen2kit.weights.safetensors_read import SafetensorsFile
from tests.tiny_checkpoint import write_tiny_checkpoint

TOKENS = [5, 17, 101, 260, 33, 33, 8, 199]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_tiny_checkpoint(folder, tied=request.param, bos_token_id=None)
    return open_checkpoint(folder)


def _same_values(a: Checkpoint, b: Checkpoint) -> bool:
    return all(
        np.array_equal(a.weights.read(p.name).float32(), b.weights.read(p.name).float32())
        for p in schema(a.spec)
    )


def _transformers(directory: Path, **kwargs: Any) -> np.ndarray[Any, Any]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, **kwargs
    )
    with torch.no_grad():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0].numpy())


def _mlx_lm(directory: Path) -> np.ndarray[Any, Any]:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(directory)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([TOKENS])))[0]


def _reference(checkpoint: Checkpoint) -> np.ndarray[Any, Any]:
    return ReferenceModel(checkpoint.spec, checkpoint.weights).logits(TOKENS)


def test_hf_output_is_the_same_model_to_transformers(source: Checkpoint, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", to="hf", max_shard_bytes=200_000)
    target = open_checkpoint(tmp_path / "out")
    assert (target.format, target.dtype) == ("hf", "float32")
    assert target.spec == source.spec
    assert target.generation == source.generation
    assert _same_values(source, target)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert np.abs(_transformers(tmp_path / "out") - _reference(source)).max() < 1e-4
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


def test_mlx_output_is_the_same_model_to_mlx_lm(source: Checkpoint, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="mlx")
    target = open_checkpoint(tmp_path / "out")
    assert target.format == "mlx"
    assert target.quantization is None
    assert _same_values(source, target)
    assert np.abs(_mlx_lm(tmp_path / "out") - _reference(source)).max() < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_mlx_equals_mlx_lms_own_conversion(
    source: Checkpoint, tmp_path: Path, bits: int
) -> None:
    pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    convert(source, tmp_path / "ours", to="mlx", quantize_bits=bits, group_size=32)
    mlx_lm.convert(
        str(source.path), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=32
    )
    ours = SafetensorsFile(tmp_path / "ours/model.safetensors")
    theirs = SafetensorsFile(tmp_path / "theirs/model.safetensors")
    assert set(ours.names()) == set(theirs.names())
    for name in ours.names():
        assert ours.info(name) == theirs.info(name)
        assert bytes(ours.read(name).data) == bytes(theirs.read(name).data), name
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs")]
    assert configs[0]["quantization"] == configs[1]["quantization"]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    for folder in ("ours", "theirs"):
        target = open_checkpoint(tmp_path / folder)
        assert target.quantization is not None
        assert (target.quantization.bits, target.quantization.group_size) == (bits, 32)
        assert target.weights.affine("model.embed_tokens.weight") is not None
        assert np.abs(_mlx_lm(tmp_path / folder) - _reference(target)).max() < 1e-3


def test_mlx_rows_that_do_not_divide_stay_dense(source: Checkpoint, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="mlx", quantize_bits=4, group_size=64)
    target = open_checkpoint(tmp_path / "out")
    assert target.weights.affine("model.layers.0.self_attn.q_proj.weight") is not None
    assert target.weights.affine("model.layers.0.mlp.down_proj.weight") is None
    assert np.abs(_mlx_lm(tmp_path / "out") - _reference(target)).max() < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_to_nearest_even(source: Checkpoint, tmp_path: Path, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    convert(source, tmp_path / "out", to="hf", dtype=dtype)
    target = open_checkpoint(tmp_path / "out")
    assert target.dtype == dtype
    for param in schema(source.spec):
        values = torch.from_numpy(source.weights.read(param.name).float32().copy())
        expected = values.to(getattr(torch, dtype)).float().numpy()
        assert np.array_equal(target.weights.read(param.name).float32(), expected)


def test_dequantising_mlx_to_hf(source: Checkpoint, tmp_path: Path) -> None:
    convert(source, tmp_path / "packed", to="mlx", quantize_bits=8, group_size=32)
    packed = open_checkpoint(tmp_path / "packed")
    convert(packed, tmp_path / "dense", to="hf", dtype="float32")
    dense = open_checkpoint(tmp_path / "dense")
    assert dense.quantization is None
    assert _same_values(packed, dense)


def test_requantising_the_same_way_copies_the_codes(source: Checkpoint, tmp_path: Path) -> None:
    for name, origin in (("a", source.path), ("b", tmp_path / "a")):
        convert(open_checkpoint(origin), tmp_path / name, to="mlx", quantize_bits=4, group_size=32)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize("gguf_type", ["f32", "f16", "bf16"])
def test_gguf_round_trip(source: Checkpoint, tmp_path: Path, gguf_type: GgufType) -> None:
    dtype = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[gguf_type]
    convert(source, tmp_path / "rounded", to="hf", dtype=dtype)  # type: ignore[arg-type]
    rounded = open_checkpoint(tmp_path / "rounded")
    convert(rounded, tmp_path / "m.gguf", to="gguf")
    convert(open_checkpoint(tmp_path / "m.gguf"), tmp_path / "back", to="hf")
    back = open_checkpoint(tmp_path / "back")
    assert back.spec == source.spec
    assert back.dtype == dtype
    assert back.generation == source.generation
    assert _same_values(rounded, back)
    text = "the cat: 12 < 3 <|im_end|>\n"
    assert back.tokenizer().encode(text) == source.tokenizer().encode(text)
    assert back.tokenizer().chat_template == source.tokenizer().chat_template


@pytest.mark.parametrize(("gguf_type", "tolerance"), [("f32", 1e-4), ("f16", 1e-4), ("q8_0", 1e-3)])
def test_transformers_loads_our_gguf(
    source: Checkpoint, tmp_path: Path, gguf_type: GgufType, tolerance: float
) -> None:
    convert(source, tmp_path / "m.gguf", to="gguf", gguf_type=gguf_type)
    target = open_checkpoint(tmp_path / "m.gguf")
    logits = _transformers(tmp_path, gguf_file="m.gguf")
    assert np.abs(logits - _reference(target)).max() < tolerance


ROPES = {
    "linear": RoPESpec(rope_theta=5e5, scaling=LinearScaling(factor=2.5)),
    "yarn": RoPESpec(scaling=YarnScaling(factor=4.0, original_max_position_embeddings=64)),
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("to", ["hf", "mlx", "gguf"])
def test_rope_scaling_survives(tmp_path: Path, rope: str, to: Format) -> None:
    write_tiny_checkpoint(tmp_path / "in", rope=ROPES[rope], bos_token_id=None)
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    convert(open_checkpoint(tmp_path / "in"), out, to=to)
    assert open_checkpoint(out).spec.rope == ROPES[rope]


def test_the_record_holds_the_sums_of_what_is_on_disk(source: Checkpoint, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="mlx", quantize_bits=4, group_size=32)
    record = json.loads((tmp_path / "out" / RECORD_NAME).read_text())
    file = SafetensorsFile(tmp_path / "out/model.safetensors")
    assert set(record["sha256"]) == set(file.names())
    for name, expected in record["sha256"].items():
        assert hashlib.sha256(file.read(name).data).hexdigest() == expected
    assert record["source"] == {"path": str(source.path), "format": "hf", "adapter": None}
    assert {"python", "qwen2kit"} <= set(record["versions"])


def test_an_existing_output_is_kept_unless_forced(source: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert(source, out, to="hf")
    with pytest.raises(ConfigError, match="use --force"):
        convert(source, out, to="mlx")
    assert open_checkpoint(out).format == "hf"
    convert(source, out, to="mlx", force=True)
    assert open_checkpoint(out).format == "mlx"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_never_replaces_what_is_no_model(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a model directory"):
        convert(source, tmp_path / "home", to="hf", force=True)
    with pytest.raises(ConfigError, match="is or contains the source"):
        convert(source, source.path, to="hf", force=True)
    with pytest.raises(ConfigError, match="is or contains the source"):
        convert(source, source.path.parent, to="hf", force=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("to", ["hf", "mlx", "gguf"])
def test_a_failure_leaves_nothing_behind(source: Checkpoint, tmp_path: Path, to: Format) -> None:
    calls = 0

    def explode(name: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError("no space left")

    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    with pytest.raises(OSError, match="no space left"):
        convert(source, out, to=to, progress=explode)
    assert list(tmp_path.iterdir()) == []


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.convert import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
try:
    convert(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), to=sys.argv[3])
except OSError as error:
    print(type(error).__name__, error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("to", ["hf", "mlx", "gguf"])
def test_a_write_that_the_system_refuses_leaves_nothing(
    source: Checkpoint, tmp_path: Path, to: Format
) -> None:
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    command = [sys.executable, "-c", _LIMITED, str(source.path), str(out), to, "100000"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["OSError", str(errno.EFBIG)], result.stderr
    assert list(tmp_path.iterdir()) == []


def test_overflow_to_float16_is_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "in", scale=1e5)
    with pytest.raises(WeightError, match="overflow float16"):
        convert(open_checkpoint(tmp_path / "in"), tmp_path / "out", to="hf", dtype="float16")
    assert not (tmp_path / "out").exists()


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bits for hf": ("out", {"to": "hf", "quantize_bits": 4}, "for --to mlx"),
    "gguf type for hf": ("out", {"to": "hf", "gguf_type": "f16"}, "--to gguf"),
    "gguf without suffix": ("out", {"to": "gguf"}, "ends in .gguf"),
    "hf with gguf suffix": ("out.gguf", {"to": "hf"}, "use --to gguf"),
    "odd bits": ("out", {"to": "mlx", "quantize_bits": 5}, "bits must be one of"),
    "odd group": ("out", {"to": "mlx", "quantize_bits": 4, "group_size": 48}, "group size"),
    "integer dtype": ("out", {"to": "hf", "dtype": "int8"}, "dtype must be one of"),
    "two types": ("o.gguf", {"to": "gguf", "gguf_type": "f16", "dtype": "float32"}, "contradict"),
    "no shard": ("out", {"to": "hf", "max_shard_bytes": 0}, "positive"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS, ids=lambda case: case.replace(" ", "-"))
def test_contradicting_options(source: Checkpoint, tmp_path: Path, case: str) -> None:
    out, options, message = CONTRADICTIONS[case]
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / out, **options)
    assert list(tmp_path.iterdir()) == []
