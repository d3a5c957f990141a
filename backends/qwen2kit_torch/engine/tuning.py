"""How much of a matrix one program of a product kernel reads.

Chosen by shape from measurements on an H100 (`benchmarks/torch_decode.py`; those of packed weights
on an H200, `benchmarks/torch_packed.py`): whole rows in one tile
where they fit, as many programs as keep all multiprocessors busy, and in each thread enough loads
on their way to keep the memory busy.
"""

from __future__ import annotations

from dataclasses import dataclass

_WIDEST = 4096
_WASTE = 1.34
_PROGRAMS = 528
_LEAST_TURNS = 2
_TALL = 8192
_MOST_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns (powers of two) of a program's tile, its warps, and tiles one after the
    other (of the head only)."""

    rows: int
    block: int
    warps: int
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class KeysTile:
    """Of attention of single tokens: keys taken at once, warps, and how far keys are spread over
    programs (see `kernels.attention`)."""

    keys: int = 64
    warps: int = 4
    spread: int = 2


def keys_tile(itemsize: int) -> KeysTile:
    """For heads of values of ``itemsize`` bytes; as much shared memory whatever they are."""
    return KeysTile(64 if itemsize <= 2 else 32)


@dataclass(frozen=True, slots=True)
class Tiles:
    """A tile for every product of a single row, and for attention."""

    heads: Tile
    out: Tile
    gate_up: Tile
    down: Tile
    head: Tile
    keys: KeysTile


@dataclass(frozen=True, slots=True)
class RowsTile:
    """Of a program of products of several rows with codes: rows of ``x``, rows of the matrix,
    columns at once, ranges of columns, warps, stages."""

    rows: int
    block: int
    span: int
    splits: int
    warps: int
    stages: int

    def padded(self, height: int) -> int:
        """``height`` rounded up to whole blocks."""
        return -(-height // self.block) * self.block


@dataclass(frozen=True, slots=True)
class PromptTile:
    """Of a program of attention over many tokens: tokens, keys at once, warps, stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def prompt_tile(head_dim: int, itemsize: int) -> PromptTile:
    """For heads of ``head_dim`` values of ``itemsize`` bytes; float32 takes no tensor cores."""
    if itemsize > 2:
        return PromptTile(16, 32, 4, 1)
    return PromptTile(128, 64, 8, 2 if head_dim > 64 else 3)


def tiles(hidden: int, heads_width: int, ffn: int, itemsize: int) -> Tiles:
    """Tiles for a model of ``hidden`` size whose query heads are ``heads_width`` wide, with
    activations of ``itemsize`` bytes."""
    wide = _block(hidden)
    return Tiles(
        heads=_tile(4, wide),
        out=_tile(4, min(2048, _block(heads_width))),
        gate_up=_tile(16, 512) if 512 < hidden <= 1024 else _tile(2 if wide > 1024 else 4, wide),
        down=_tile(4, min(2048, power_of_two(ffn))) if ffn < 16384 else _tile(2, 4096, 8),
        head=_tile(4, wide, repeat=8),
        keys=keys_tile(itemsize),
    )


def packed_tile(height: int, width: int, bits: int) -> Tile:
    """A tile, in bytes of codes, for a single row's product with ``[height, width]`` in ``bits``.

    Every lane takes 16 bytes of each row, so that no sums of ``x`` are shared between warps.
    """
    if height >= _TALL:
        return Tile(8, 512, 1)
    block = max(512, min(2048, power_of_two(width * bits // 8)))
    rows = 2 if block == 512 else 4 if block == 1024 or bits == 8 else 8
    return Tile(rows, block, block // 512)


def rows_tile(height: int, width: int, rows: int, bits: int, itemsize: int) -> RowsTile:
    """For ``rows`` rows times a matrix ``[height, width]`` in ``bits``; ``itemsize`` of ``x``."""
    span = 32 if itemsize > 2 else 256 if bits == 4 and rows <= 32 else 128
    while width % span:
        span //= 2
    block = 64
    programs = _PROGRAMS if rows <= 32 else _PROGRAMS // 2
    most = min(_MOST_SPLITS, width // span // _LEAST_TURNS)
    splits = max(1, min(programs // -(-height // block), most))
    return RowsTile(max(16, power_of_two(rows)), block, span, splits, 4, 3)


def pass_rows(rows: int) -> int:
    """Rows of the captured pass that takes ``rows``: few enough sizes to capture, and near enough
    to each other that what is computed for nothing is little."""
    step = 64 if rows <= 512 else 256
    return -(-rows // step) * step


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()


def _tile(rows: int, block: int, warps: int | None = None, repeat: int = 1) -> Tile:
    """With 64 elements for every thread, where that makes 1 to 8 warps."""
    return Tile(rows, block, warps or max(1, min(8, rows * block // 2048)), repeat)


def _block(width: int) -> int:
    """A whole row if few lanes idle then, else a divisor of it."""
    whole = power_of_two(width)
    if whole <= _WIDEST and whole <= _WASTE * width:
        return whole
    block = _WIDEST
    while block > 256 and -(-width // block) * block > 1.1 * width:
        block //= 2
    return block
