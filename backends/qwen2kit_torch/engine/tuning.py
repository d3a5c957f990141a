"""How much of a matrix one program of a product kernel reads.

Chosen by shape from measurements on an H100 (`benchmarks/torch_decode.py`): enough programs for all
multiprocessors, and in each enough bytes on their way to keep the memory busy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns (powers of two) of a program's tile, its warps, and tiles one after the
    other (of the head only)."""

    rows: int
    block: int
    warps: int
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Tiles:
    """A tile for every product of a step, and the keys that a step of attention takes at once."""

    heads: Tile
    out: Tile
    gate_up: Tile
    down: Tile
    head: Tile
    keys: int = 64


def tiles(hidden: int, head_dim: int, heads_width: int) -> Tiles:
    """Tiles for a model of ``hidden`` size whose query heads are ``heads_width`` wide."""
    block = _block(hidden)
    return Tiles(
        heads=Tile(min(8, head_dim), block, 4),
        out=Tile(8, _block(heads_width), 4),
        gate_up=Tile(8, block, 4),
        down=Tile(8 if hidden >= 2048 else 4, 1024, 4),
        head=Tile(8, block, 4, repeat=4),
    )


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()


def _block(width: int) -> int:
    """One block where a row fits into it, else the largest that leaves few lanes idle."""
    if width <= 1024:
        return power_of_two(width)
    return 1024 if width % 1024 == 0 else 512
