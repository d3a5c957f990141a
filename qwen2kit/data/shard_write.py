"""Writing one shard: streamed to hidden files, digested on the way, visible when complete."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen2kit.data.shard_format import ShardInfo
from qwen2kit.partial_file import PartialFile


class _ArrayFile:
    """A file that is being written, with its digest."""

    def __init__(self, path: Path) -> None:
        self.digest = sha256()
        self._partial = PartialFile(path)

    def write(self, values: NDArray[np.generic]) -> None:
        data = values.tobytes()
        self._partial.file.write(data)
        self.digest.update(data)

    def finish(self) -> None:
        self._partial.finish()
        self._partial.publish()

    def discard(self) -> None:
        self._partial.discard()


class ShardWriter:
    """Context manager for the files of one shard; leaving it without `finish` removes them.

    Args:
        directory: exists.
        name: of the shard.
        dtype: ``uint16`` or ``uint32``.
        masked: whether documents come with a mask (conversations).
    """

    def __init__(self, directory: Path, name: str, dtype: str, *, masked: bool) -> None:
        self._name = name
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._directory = directory
        self._files: dict[str, _ArrayFile] = {}
        suffixes = ("tokens", "offsets", "supervised") if masked else ("tokens", "offsets")
        for suffix in suffixes:
            self._files[suffix] = _ArrayFile(directory / f"{name}.{suffix}")
        self._files["offsets"].write(np.zeros(1, dtype="<i8"))
        self._bits = np.zeros(0, dtype=np.bool_)  # fewer than a byte
        self._documents = self._tokens = self._supervised = 0
        self.empty = 0

    def add(
        self, documents: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] | None = None
    ) -> None:
        """Append documents (of at least two tokens each), with their masks if the shard has any.

        Raises OSError if the disk is full.
        """
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        total = int(lengths.sum())
        tokens = np.fromiter(chain.from_iterable(documents), dtype=self._dtype, count=total)
        self._files["tokens"].write(tokens)
        self._files["offsets"].write((self._tokens + np.cumsum(lengths)).astype("<i8"))
        if masks is None:
            self._supervised += total
        else:
            self._add_bits(np.fromiter(chain.from_iterable(masks), dtype=np.bool_, count=total))
        self._tokens += total
        self._documents += len(documents)

    def finish(self) -> ShardInfo:
        """Make the files durable and visible. Raises OSError if the disk is full."""
        if "supervised" in self._files:
            self._files["supervised"].write(np.packbits(self._bits, bitorder="little"))
        for file in self._files.values():
            file.finish()
        return ShardInfo(
            name=self._name,
            documents=self._documents,
            tokens=self._tokens,
            supervised=self._supervised,
            empty=self.empty,
            sha256={suffix: file.digest.hexdigest() for suffix, file in self._files.items()},
        )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.discard()

    def _add_bits(self, mask: NDArray[np.bool_]) -> None:
        self._supervised += int(mask.sum())
        bits = np.concatenate([self._bits, mask])
        whole = len(bits) // 8 * 8
        self._files["supervised"].write(np.packbits(bits[:whole], bitorder="little"))
        self._bits = bits[whole:]
