"""Are token shards still what was written? Every file's SHA-256 against the index."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from qwen2kit.data.shard_format import ShardIndex, ShardInfo, read_index

_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that differs from the index.

    Attributes:
        file: its name.
        problem: in what way.
    """

    file: str
    problem: str


def verify_shards(
    directory: Path, *, threads: int, progress: Callable[[int], None]
) -> tuple[ShardIndex, list[Damage]]:
    """Read and digest all files.

    Args:
        threads: files read at once (digesting releases the interpreter lock).
        progress: called with the bytes of every finished shard.

    Raises:
        DataError: the directory holds no finished shards.
    """
    index = read_index(directory)

    def check(shard: ShardInfo) -> list[Damage]:
        sizes = shard.sizes(index.dtype)
        found = [
            damage
            for suffix, digest in shard.sha256.items()
            if (damage := _check(directory / f"{shard.name}.{suffix}", sizes[suffix], digest))
        ]
        progress(sum(sizes[suffix] for suffix in shard.sha256))
        return found

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(check, index.shards))
    return index, [damage for found in results for damage in found]


def _check(path: Path, size: int, digest: str) -> Damage | None:
    try:
        found = path.stat().st_size
        if found != size:
            return Damage(path.name, f"has {found} bytes instead of {size}")
        if _digest(path) != digest:
            return Damage(path.name, "has another SHA-256 than when it was written")
    except OSError as error:
        return Damage(path.name, f"cannot be read: {error.strerror}")
    return None


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
