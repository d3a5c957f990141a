"""Our safetensors reader and writer against the library's, and against hostile files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qwen2kit.errors import WeightError
from qwen2kit.weights.hf_layout import open_weights
from qwen2kit.weights.safetensors_read import SafetensorsFile
from qwen2kit.weights.safetensors_write import (
    INDEX_NAME,
    SafetensorsFileWriter,
    SafetensorsWriter,
    write_safetensors,
)
from qwen2kit.weights.source import TensorInfo
from qwen2kit.weights.tensor import HostTensor, from_float32, from_numpy

DTYPES = ("float64", "float32", "float16", "int64", "int32", "uint32", "int8", "uint8")


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, np.ndarray[Any, Any]]:
    names = draw(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    result = {}
    for name in names:
        if name == "__metadata__":
            continue
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        raw = rng.integers(0, 100, shape)
        result[name] = np.asarray(raw).astype(draw(st.sampled_from(DTYPES)))
    return result


@given(tensors=arrays())
@settings(max_examples=60, deadline=None)
def test_the_library_reads_what_we_write_and_we_read_what_it_writes(
    tensors: dict[str, np.ndarray[Any, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    ours, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"
    write_safetensors(ours, [(n, _host(a)) for n, a in tensors.items()], metadata={"format": "pt"})
    save_file(tensors, theirs, metadata={"format": "pt"})

    loaded = load_file(ours)
    assert set(loaded) == set(tensors)
    file = SafetensorsFile(theirs)
    assert set(file.names()) == set(tensors)
    assert file.metadata == {"format": "pt"}
    for name, array in tensors.items():
        for other in (loaded[name], file.read(name).raw()):
            assert other.dtype == array.dtype
            assert other.shape == array.shape
            assert np.array_equal(other, array)


def _host(array: np.ndarray[Any, Any]) -> HostTensor:
    return HostTensor(array.dtype.name, array.shape, memoryview(array.tobytes()))  # type: ignore[arg-type]


def test_bfloat16_both_ways_through_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    values = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    save_torch({"w": values.bfloat16()}, tmp_path / "a.safetensors")
    read = SafetensorsFile(tmp_path / "a.safetensors").read("w")
    assert read.dtype == "bfloat16"
    assert np.array_equal(read.float32(), values.bfloat16().float().numpy())

    write_safetensors(tmp_path / "b.safetensors", [("w", from_float32(values.numpy(), "bfloat16"))])
    back = load_torch(tmp_path / "b.safetensors")["w"]
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, values.bfloat16())


def _plan(count: int) -> list[tuple[str, TensorInfo]]:
    return [(f"t{i}", TensorInfo("float32", (10, 10))) for i in range(count)]


def test_shards_respect_the_limit_and_the_index_is_transformers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal((10, 10)).astype(np.float32) for name, _ in _plan(7)}
    with SafetensorsWriter(
        tmp_path, _plan(7), metadata={"format": "pt"}, max_shard_bytes=900
    ) as writer:
        for name in reversed(values):
            writer.write(name, from_numpy(values[name]))
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, framework="np") as file:
            assert np.array_equal(file.get_tensor(name), values[name])
    source = open_weights(tmp_path)
    assert all(np.array_equal(source.read(name).raw(), values[name]) for name in values)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, _plan(2), max_shard_bytes=10) as writer:
        for name, _ in _plan(2):
            writer.write(name, from_numpy(np.zeros((10, 10), np.float32)))
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 2


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, [("old", from_numpy(np.ones(3, np.float32)))])
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        _write_until_full(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def _write_until_full(path: Path) -> None:
    with SafetensorsFileWriter(path, _plan(2)) as writer:
        writer.write("t0", from_numpy(np.zeros((10, 10), np.float32)))
        raise OSError("disk full")


def test_forgotten_wrong_and_unplanned_tensors_are_refused(tmp_path: Path) -> None:
    zeros = from_numpy(np.zeros((10, 10), np.float32))
    with pytest.raises(WeightError, match=r"never written.*t1"):  # noqa: SIM117
        with SafetensorsWriter(tmp_path, _plan(2)) as writer:
            writer.write("t0", zeros)
    for name, tensor in (("other", zeros), ("t0", from_numpy(np.zeros(3, np.float32)))):
        with (
            pytest.raises(WeightError, match="planned"),
            SafetensorsWriter(tmp_path, _plan(1)) as w,
        ):
            w.write(name, tensor)
    assert os.listdir(tmp_path) == []


def _entry(begin: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, Any]:
    sizes = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}


def _file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "only 0 bytes"),
    "short": (b"\x01\x02", "only 2 bytes"),
    "pickle": (b"\x80\x04\x95" + b"x" * 100, "not a safetensors file"),
    "huge header": (_file({}, length=2**63), "header of 9223372036854775808 bytes"),
    "header beyond the end": (_file({}, length=1000), "truncated"),
    "not JSON": (_file(b"{" * 20), "not valid JSON"),
    "deep JSON": (_file(b"[" * 200_000), "not valid JSON"),
    "not UTF-8": (_file(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "a list": (_file([]), "header is no object"),
    "metadata of numbers": (_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "duplicate key": (
        _file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"x"),
        "duplicate key 'a'",
    ),
    "unknown dtype": (_file({"a": _entry(0, 1, "F4")}, b"x"), "unknown dtype 'F4'"),
    "dtype is a list": (_file({"a": _entry(0, 1, ["F32"])}, b"x"), "unknown dtype"),
    "negative shape": (_file({"a": _entry(0, 1, shape=[-1])}, b"x"), "shape"),
    "boolean shape": (_file({"a": _entry(0, 1, shape=[True])}, b"x"), "shape"),
    "descending offsets": (_file({"a": _entry(1, 0, shape=[1])}, b"x"), "ascending"),
    "size lie": (_file({"a": _entry(0, 4, "F32", [2])}, b"xxxx"), "need 8"),
    "enormous shape": (_file({"a": _entry(0, 4, "F32", [2**62, 2**62])}, b"xxxx"), "need"),
    "overlap": (
        _file({"a": _entry(0, 4), "b": _entry(2, 6)}, b"x" * 6),
        "overlaps",
    ),
    "gap": (_file({"a": _entry(0, 2), "b": _entry(3, 5)}, b"x" * 5), "gap"),
    "truncated": (_file({"a": _entry(0, 8)}, b"xxx"), "truncated .*need 8 bytes, the file has 3"),
    "trailing": (_file({"a": _entry(0, 1)}, b"xyz"), "2 bytes after the last tensor"),
    "extra key": (_file({"a": _entry(0, 1) | {"x": 1}}, b"x"), "exactly dtype"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "-"))
def test_hostile_files_are_refused_in_one_line_that_names_the_file(
    case: str, tmp_path: Path
) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(position=st.integers(0, 300), byte=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_any_flipped_byte_is_an_error_or_the_file_stays_readable(
    position: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    write_safetensors(
        path, [(f"t{i}", from_numpy(np.arange(6, dtype=np.float32))) for i in range(3)]
    )
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
        for name in file.names():
            file.read(name)
    except WeightError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_unsupported_dtypes_open_but_name_themselves_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_file({"a": _entry(0, 2, "F8_E4M3", [2])}, b"xx"))
    with pytest.raises(WeightError, match="'a' has dtype F8_E4M3"):
        SafetensorsFile(path).read("a")


def _sharded(folder: Path) -> None:
    with SafetensorsWriter(folder, _plan(3), max_shard_bytes=400) as writer:
        for name, _ in _plan(3):
            writer.write(name, from_numpy(np.zeros((10, 10), np.float32)))


def _edit_map(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "..\\x.safetensors", 7],
)
def test_an_index_cannot_point_outside_its_directory(tmp_path: Path, name: object) -> None:
    _sharded(tmp_path)
    _edit_map(tmp_path, lambda weight_map: weight_map.update(t0=name))
    with pytest.raises(WeightError, match=r"not a plain \.safetensors name"):
        open_weights(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    _sharded(tmp_path)
    _edit_map(tmp_path, lambda m: m.update(extra="model-00001-of-00003.safetensors"))
    with pytest.raises(WeightError, match="does not hold 'extra'"):
        open_weights(tmp_path)
    _edit_map(tmp_path, lambda m: (m.pop("extra"), m.pop("t0"), m.update(t1=m["t1"])))
    (tmp_path / "model-00001-of-00003.safetensors").rename(tmp_path / "unlisted.bin")
    assert open_weights(tmp_path).names() == ("t1", "t2")
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(WeightError, match=r"model-00003-of-00003.safetensors is missing"):
        open_weights(tmp_path)


def test_shards_without_index_are_counted(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    assert open_weights(tmp_path).names() == ("t0", "t1", "t2")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightError, match="has 2 of the shards"):
        open_weights(tmp_path)


def test_a_stale_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    _sharded(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", [("t0", from_numpy(np.zeros(1, np.float32)))])
    with pytest.raises(WeightError, match="remove the stale one"):
        open_weights(tmp_path)
