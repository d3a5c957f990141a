"""GGUF reading against the gguf library, and against hostile and odd files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.errors import ConfigError, WeightError
from qwen2kit.spec.model import ModelSpec, MoESpec
from qwen2kit.spec.schema import EMBED_TOKENS, LM_HEAD, schema
from qwen2kit.weights.checkpoint import Checkpoint, open_checkpoint
from qwen2kit.weights.convert import convert
from qwen2kit.weights.gguf_file import GgufFile
from qwen2kit.weights.gguf_names import gguf_slots
from qwen2kit.weights.gguf_read import open_gguf
from qwen2kit.weights.gguf_spec import spec_from_gguf, spec_to_gguf
from tests.conftest import random_weights, small_spec
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("gguf") / "model"
    write_tiny_checkpoint(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def written(source: Checkpoint) -> Path:
    path = source.path.parent / "model.gguf"
    convert(source, path, to="gguf", gguf_type="q8_0", force=True)
    return path


def test_the_library_reads_the_same_metadata_and_tensors(written: Path) -> None:
    ours, theirs = GgufFile(written), GGUFReader(written)
    fields = {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert ours.fields == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        row = ours.tensors[tensor.name]
        assert row.type == tensor.tensor_type
        assert row.shape == tuple(reversed(tensor.shape.tolist()))
        assert bytes(ours.data(tensor.name)) == tensor.data.tobytes()


TYPES = ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]


def write_gguf_by_library(
    path: Path,
    spec: ModelSpec,
    kinds: dict[str, str] | None = None,
    *,
    default: str = "F32",
    extra: dict[str, Any] | None = None,
    arch: str = "qwen2",
    replace_tensors: dict[str, np.ndarray[Any, Any]] | None = None,
) -> None:
    """A GGUF file made with the gguf library's own writer and quantisers."""
    weights = random_weights(spec)
    writer = GGUFWriter(path, arch)
    for key, value in spec_to_gguf(spec).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{arch}.{key}", value)
    for key, value in (extra or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for slot in gguf_slots(spec):
        parts = [weights.read(param.name).float32() for param in slot.params]
        values = np.stack(parts) if slot.stacked else parts[0].reshape(slot.shape)
        values = (replace_tensors or {}).get(slot.name, values)
        kind = GGMLQuantizationType[(kinds or {}).get(slot.name, default)]
        if values.ndim == 1:
            kind = GGMLQuantizationType.F32
        writer.add_tensor(slot.name, gguf_quantize(values, kind), raw_dtype=kind)
    for name, values in (replace_tensors or {}).items():
        if name not in {slot.name for slot in gguf_slots(spec)}:
            kind = GGMLQuantizationType[(kinds or {}).get(name, default)]
            writer.add_tensor(name, gguf_quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", TYPES)
def test_every_block_type_reads_as_the_library_dequantises_it(tmp_path: Path, kind: str) -> None:
    spec = small_spec(bos_token_id=None, eos_token_id=None)
    write_gguf_by_library(tmp_path / "m.gguf", spec, default=kind)
    read, source = open_gguf(tmp_path / "m.gguf")
    assert read == spec
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    for slot in gguf_slots(spec):
        tensor = tensors[slot.name]
        expected = dequantize(tensor.data, tensor.tensor_type).reshape(slot.params[0].shape)
        got = source.read(slot.params[0].name)
        assert got.dtype == source.info(slot.params[0].name).dtype
        assert np.array_equal(got.float32(), expected)


MOE = MoESpec(
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=96,
)


def test_experts_stack_and_the_shared_gate_keeps_its_row(tmp_path: Path) -> None:
    spec = small_spec(tied=False, moe=MOE, bos_token_id=None, eos_token_id=None)
    write_gguf_by_library(tmp_path / "m.gguf", spec, arch="qwen2moe")
    read, source = open_gguf(tmp_path / "m.gguf")
    assert read == spec
    weights = random_weights(spec)
    assert set(source.names()) == {param.name for param in schema(spec)}
    for param in schema(spec):
        assert source.info(param.name).shape == param.shape
        expected = weights.read(param.name).float32()
        assert np.array_equal(source.read(param.name).float32(), expected)


def _gguf_names_of(spec: ModelSpec) -> set[str]:
    return {slot.name for slot in gguf_slots(spec)}


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_names_are_those_of_the_library(moe: MoESpec | None) -> None:
    import gguf

    spec = small_spec(tied=False, moe=moe)
    arch = gguf.MODEL_ARCH.QWEN2 if moe is None else gguf.MODEL_ARCH.QWEN2MOE
    names = gguf.get_tensor_name_map(arch, spec.num_hidden_layers)
    for slot in gguf_slots(spec):
        canonical = slot.params[0].name
        if slot.stacked:
            canonical = canonical.replace(".experts.0.", ".experts.")
        assert names.get_name(canonical, try_suffixes=(".weight", ".bias")) == slot.name


def _head(spec: ModelSpec, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    shape = (spec.vocab_size, spec.hidden_size)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.1)


@pytest.mark.parametrize(
    ("embed", "head", "kept"),
    [("Q5_0", "Q8_0", "output.weight"), ("F16", "Q4_0", "token_embd.weight")],
)
def test_two_copies_of_one_matrix_are_tied_and_the_better_one_is_read(
    tmp_path: Path, embed: str, head: str, kept: str
) -> None:
    spec = small_spec()
    matrix = _head(spec, 7)
    write_gguf_by_library(
        tmp_path / "m.gguf",
        spec,
        {"token_embd.weight": embed, "output.weight": head},
        replace_tensors={"token_embd.weight": matrix, "output.weight": matrix},
    )
    read, source = open_gguf(tmp_path / "m.gguf")
    assert read.tie_word_embeddings
    assert LM_HEAD not in source.names()
    tensor = next(t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == kept)
    expected = dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(source.read(EMBED_TOKENS).float32(), expected)


@pytest.mark.parametrize("difference", [1.0, 0.03])
def test_different_matrices_stay_untied(tmp_path: Path, difference: float) -> None:
    spec = small_spec(tied=False)
    matrix = _head(spec, 7)
    other = matrix + np.float32(difference) * _head(spec, 8)
    write_gguf_by_library(
        tmp_path / "m.gguf",
        spec,
        default="F16",
        replace_tensors={"token_embd.weight": matrix, "output.weight": other},
    )
    read, source = open_gguf(tmp_path / "m.gguf")
    assert not read.tie_word_embeddings
    assert np.array_equal(source.read(LM_HEAD).raw(), other.astype(np.float16))


def test_other_architectures_and_unknown_keys_are_named(tmp_path: Path) -> None:
    spec = small_spec()
    write_gguf_by_library(tmp_path / "llama.gguf", spec, arch="llama")
    with pytest.raises(ConfigError, match="architecture 'llama' is not of the Qwen2 family"):
        open_checkpoint(tmp_path / "llama.gguf")
    write_gguf_by_library(tmp_path / "odd.gguf", spec, extra={"qwen2.attention.sliding_window": 7})
    with pytest.raises(ConfigError, match=r"unknown metadata qwen2.attention.sliding_window"):
        open_checkpoint(tmp_path / "odd.gguf")
    write_gguf_by_library(tmp_path / "split.gguf", spec, extra={"split.count": 3})
    with pytest.raises(WeightError, match="one part of a split GGUF"):
        open_checkpoint(tmp_path / "split.gguf")


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    spec = small_spec()
    matrix = np.zeros((4, 64), np.float32)
    write_gguf_by_library(tmp_path / "m.gguf", spec, replace_tensors={"rope_freqs.weight": matrix})
    with pytest.raises(WeightError, match=r"unexpected: rope_freqs\.weight"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "key", ["block_count", "attention.layer_norm_rms_epsilon", "context_length"]
)
def test_missing_metadata_is_named(key: str) -> None:
    fields = {f"qwen2.{k}": v for k, v in spec_to_gguf(small_spec()).items()}
    fields["general.architecture"] = "qwen2"
    del fields[f"qwen2.{key}"]
    with pytest.raises(ConfigError, match=key):
        spec_from_gguf(fields, vocab_size=199, tied=True)


def test_metadata_round_trips_odd_head_sizes() -> None:
    spec = small_spec(head_dim=24, bos_token_id=None, eos_token_id=None)
    fields = {f"qwen2.{k}": v for k, v in spec_to_gguf(spec).items()}
    fields["general.architecture"] = "qwen2"
    assert spec_from_gguf(fields, vocab_size=199, tied=True) == spec


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _head_bytes(tensors: int, fields: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body + bytes(64)


def _tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _string(name) + dims + struct.pack("<IQ", kind, offset)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "safetensors": (b"\x10" + bytes(7) + b"{}" + bytes(30), "wrong magic"),
    "version": (_head_bytes(0, 0, version=99), "version 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
    "many fields": (_head_bytes(0, 2**60), "items announced"),
    "many tensors": (_head_bytes(2**60, 0), "items announced"),
    "long key": (_head_bytes(0, 1, struct.pack("<Q", 2**60)), "truncated"),
    "long array": (
        _head_bytes(0, 1, _string(b"k") + struct.pack("<IIQ", 9, 0, 2**60)),
        "truncated",
    ),
    "long string array": (
        _head_bytes(0, 1, _string(b"k") + struct.pack("<IIQ", 9, 8, 2**60)),
        "items announced",
    ),
    "array of arrays": (
        _head_bytes(0, 1, _string(b"k") + struct.pack("<IIQ", 9, 9, 1)),
        "unknown type 9",
    ),
    "value type": (_head_bytes(0, 1, _string(b"k") + struct.pack("<I", 77)), "type 77"),
    "not UTF-8": (_head_bytes(0, 1, _string(b"\xff\xfe")), "not UTF-8"),
    "key twice": (
        _head_bytes(0, 2, 2 * (_string(b"k") + struct.pack("<IB", 0, 1))),
        "occurs twice",
    ),
    "alignment": (
        _head_bytes(0, 1, _string(b"general.alignment") + struct.pack("<II", 4, 0)),
        "alignment 0",
    ),
    "dimensions": (_head_bytes(1, 0, _tensor(b"t", [1] * 5)), "5 dimensions"),
    "block type": (_head_bytes(1, 0, _tensor(b"t", [32], kind=4096)), "block type 4096"),
    "broken block": (_head_bytes(1, 0, _tensor(b"t", [31], kind=8)), "broken blocks"),
    "tensor beyond the end": (_head_bytes(1, 0, _tensor(b"t", [2**40])), "ends at byte"),
    "offset beyond the end": (_head_bytes(1, 0, _tensor(b"t", [1], offset=2**40)), "ends at byte"),
    "misplaced": (_head_bytes(1, 0, _tensor(b"t", [1], offset=3)), "misplaced"),
    "overlap": (_head_bytes(2, 0, _tensor(b"a", [2]) + _tensor(b"b", [2])), "overlaps"),
    "name twice": (_head_bytes(2, 0, _tensor(b"a", [0]) + _tensor(b"a", [0])), "occurs twice"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "-"))
def test_hostile_files_are_refused_in_one_line_that_names_the_file(
    case: str, tmp_path: Path
) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightError, match=message) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(fraction=st.floats(0, 0.999))
@settings(max_examples=40, deadline=None)
def test_any_truncation_is_noticed(
    written: Path, fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = written.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "m.gguf"
    # The file ends with at most one alignment unit of padding, which may be missing.
    path.write_bytes(content[: int((len(content) - 32) * fraction)])
    with pytest.raises(WeightError):
        open_checkpoint(path)


@given(position=st.integers(0, 4000), byte=st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_any_flipped_header_byte_is_an_error_of_ours_or_harmless(
    written: Path, position: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(written.read_bytes())
    content[position] = byte
    path = tmp_path_factory.mktemp("flip") / "m.gguf"
    path.write_bytes(content)
    try:
        open_checkpoint(path)
    except (WeightError, ConfigError) as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.real_model
def test_the_real_model_is_tied_and_reads_its_better_copy(real_gguf: Path) -> None:
    checkpoint = open_checkpoint(real_gguf)
    assert checkpoint.spec.tie_word_embeddings
    assert checkpoint.spec.rms_norm_eps == 1e-6
    assert checkpoint.generation.stop_token_ids == (151645, 151643)
    file = GgufFile(real_gguf)
    head = file.tensors["output.weight"]
    rows = np.frombuffer(file.data("output.weight"), np.uint8).reshape(head.shape[0], -1)[:64]
    embedding = checkpoint.weights.read(EMBED_TOKENS).float32()
    assert np.array_equal(embedding[:64], dequantize(rows, head.type))
