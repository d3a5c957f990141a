"""Streaming safetensors writing: headers first, then tensor by tensor, renamed when complete.

Peak memory is one tensor. Until `close` succeeds nothing exists under a final name, so a full
disk or a crash never leaves a file that looks finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

from qwen2kit.errors import WeightError
from qwen2kit.partial_file import PartialFile, sync_directory, write_text_atomically
from qwen2kit.weights.safetensors_read import DTYPES
from qwen2kit.weights.source import TensorInfo
from qwen2kit.weights.tensor import ITEM_SIZE, HostTensor

INDEX_NAME = "model.safetensors.index.json"
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
_CODES = {dtype: code for code, dtype in DTYPES.items()}

Plan = Sequence[tuple[str, TensorInfo]]


class SafetensorsFileWriter:
    """Writes one file whose tensors are known in advance. Use as a context manager.

    Tensors may arrive in any order; on disk wide dtypes come first so that all are aligned.

    Args:
        path: final name; the data goes to a hidden temporary sibling until `close`.
        tensors: name, dtype and shape of everything that will be written.
        metadata: string pairs for ``__metadata__``.
    """

    def __init__(
        self, path: Path, tensors: Plan, *, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self._pending = dict(tensors)
        if len(self._pending) != len(tensors):
            raise WeightError(f"{path.name}: a tensor name occurs twice")
        header, self._offsets = _header(tensors, metadata or {})
        self._start = len(header)
        self._partial = PartialFile(path)
        try:
            self._partial.file.write(header)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, tensor: HostTensor) -> None:
        """Write one planned tensor.

        Raises:
            WeightError: the name was not planned or is already written, or dtype or shape differ
                from the plan.
        """
        planned = self._pending.pop(name, None)
        if planned is None:
            raise WeightError(f"{self.path.name}: tensor {name!r} was not planned")
        if planned != TensorInfo(tensor.dtype, tensor.shape):
            raise WeightError(
                f"{self.path.name}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"planned was {planned.dtype} {list(planned.shape)}"
            )
        self._partial.file.seek(self._start + self._offsets[name])
        self._partial.file.write(tensor.data)

    def finish(self) -> None:
        """Flush the temporary file to disk; it is not yet visible under its final name.

        Raises:
            WeightError: a planned tensor was never written.
        """
        if self._pending:
            raise WeightError(
                f"{self.path.name}: tensors never written: {sorted(self._pending)[:3]}"
            )
        self._partial.finish()

    def publish(self) -> None:
        """Give the finished file its final name."""
        self._partial.publish()

    def close(self) -> None:
        """`finish`, then `publish`."""
        self.finish()
        self.publish()
        sync_directory(self.path.parent)

    def abort(self) -> None:
        """Remove the temporary file; the final name stays untouched."""
        self._partial.discard()

    def __enter__(self) -> SafetensorsFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _leave(self, kind)


class SafetensorsWriter:
    """Writes ``model.safetensors``, or shards with an index. Use as a context manager.

    Args:
        directory: existing directory.
        tensors: name, dtype and shape of everything that will be written, in file order.
        metadata: ``{"format": "pt"}`` for Hugging Face, ``{"format": "mlx"}`` for MLX.
        max_shard_bytes: a shard is closed before it would exceed this (a single larger tensor
            gets a shard of its own).
    """

    def __init__(
        self,
        directory: Path,
        tensors: Plan,
        *,
        metadata: Mapping[str, str] | None = None,
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    ) -> None:
        self.directory = directory
        self._total = sum(nbytes(info) for _, info in tensors)
        self._writers: list[SafetensorsFileWriter] = []
        self._home: dict[str, SafetensorsFileWriter] = {}
        groups = _shards(tensors, max_shard_bytes)
        try:
            for number, group in enumerate(groups, start=1):
                path = directory / _shard_name(number, len(groups))
                writer = SafetensorsFileWriter(path, group, metadata=metadata)
                self._writers.append(writer)
                self._home |= dict.fromkeys((name for name, _ in group), writer)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, tensor: HostTensor) -> None:
        """Write one planned tensor; WeightError as in `SafetensorsFileWriter.write`."""
        if name not in self._home:
            raise WeightError(f"tensor {name!r} was not planned")
        self._home[name].write(name, tensor)

    def close(self) -> None:
        """Flush everything, then give all files their names, the index last."""
        for writer in self._writers:
            writer.finish()
        for writer in self._writers:
            writer.publish()
        if len(self._writers) > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": {name: writer.path.name for name, writer in self._home.items()},
            }
            write_text_atomically(self.directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        sync_directory(self.directory)

    def abort(self) -> None:
        """Remove everything that is not published."""
        for writer in self._writers:
            writer.abort()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _leave(self, kind)


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, HostTensor]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors that are already in memory as one file, atomically."""
    items = list(tensors)
    plan = [(name, TensorInfo(tensor.dtype, tensor.shape)) for name, tensor in items]
    with SafetensorsFileWriter(path, plan, metadata=metadata) as writer:
        for name, tensor in items:
            writer.write(name, tensor)


def nbytes(info: TensorInfo) -> int:
    """Bytes a tensor of this dtype and shape takes."""
    return prod(info.shape) * ITEM_SIZE[info.dtype]


def _leave(
    writer: SafetensorsFileWriter | SafetensorsWriter, kind: type[BaseException] | None
) -> None:
    if kind is not None:
        writer.abort()
        return
    try:
        writer.close()
    except BaseException:
        writer.abort()
        raise


def _header(tensors: Plan, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    for name, info in sorted(tensors, key=lambda item: -ITEM_SIZE[item[1].dtype]):
        offsets[name] = position
        end = position + nbytes(info)
        document[name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _shards(tensors: Plan, max_shard_bytes: int) -> list[list[tuple[str, TensorInfo]]]:
    groups: list[list[tuple[str, TensorInfo]]] = [[]]
    used = 0
    for name, info in tensors:
        size = nbytes(info)
        if groups[-1] and used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append((name, info))
        used += size
    return groups


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
