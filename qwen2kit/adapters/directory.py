"""Adapter directories of either layout: recognise, open, write, convert."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen2kit.adapters.lora import Adapter, AdapterFormat
from qwen2kit.errors import ConfigError, WeightError
from qwen2kit.weights.locate import ADAPTER_CONFIG, locate
from qwen2kit.weights.staging import staged_directory
from qwen2kit.weights.tensor import FLOAT_DTYPES, DType


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """What `convert_adapter` wrote.

    Attributes:
        source, out: directories.
        source_format, format: layouts.
        dtype: of the factors.
        modules: adapted matrices.
        rank: largest r.
        bytes: size of everything written.
        seconds: wall time.
    """

    source: Path
    source_format: AdapterFormat
    out: Path
    format: AdapterFormat
    dtype: DType
    modules: int
    rank: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"source": str(self.source), "out": str(self.out)}


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a directory with an adapter and no model."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def open_adapter(directory: Path) -> Adapter:
    """Open a PEFT or mlx-lm LoRA adapter; tensors stay in the mapped file where layouts allow.

    Raises:
        ConfigError, WeightError: it is damaged, incomplete, or something other than plain LoRA.
    """
    from qwen2kit.adapters import mlx_files, peft_files

    if not (directory / ADAPTER_CONFIG).is_file():
        raise WeightError(f"{directory}: has no {ADAPTER_CONFIG}; this is not an adapter")
    if (directory / mlx_files.WEIGHTS_FILE).is_file():
        return mlx_files.read_mlx(directory)
    return peft_files.read_peft(directory)


def find_adapter(adapter: str) -> Adapter:
    """Open what the user typed: a directory, a run directory of ``qwen2kit train`` or a hub id.

    Raises:
        ConfigError, WeightError: as in `locate` and `open_adapter`.
    """
    return open_adapter(locate(adapter))


def write_adapter(
    adapter: Adapter, out: Path, *, to: AdapterFormat, dtype: DType | None = None, force: bool
) -> None:
    """Write ``adapter`` as the directory ``out``, which appears only when complete.

    Args:
        to: ``hf`` (PEFT) or ``mlx`` (mlx-lm).
        dtype: of the factors; None keeps the adapter's own.
        force: replace an existing adapter.

    Raises:
        ConfigError: the layout cannot hold it, or ``out`` is in the way.
    """
    from qwen2kit.adapters import mlx_files, peft_files

    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype!r}")
    writers: dict[AdapterFormat, Callable[[Adapter, Path, DType], None]] = {
        "hf": peft_files.write_peft,
        "mlx": mlx_files.write_mlx,
    }
    with staged_directory(out, force=force) as staging:
        writers[to](adapter, staging, dtype or adapter.dtype)


def convert_adapter(
    source: Adapter, out: Path, *, to: AdapterFormat, dtype: DType | None = None, force: bool
) -> AdapterReport:
    """`write_adapter` with a report. Raises as it does, and if ``out`` holds the source."""
    started = time.perf_counter()
    resolved, origin = out.resolve(), source.path.resolve()
    if resolved == origin or resolved in origin.parents:
        raise ConfigError(f"{out}: is or contains the source; choose another output")
    write_adapter(source, out, to=to, dtype=dtype, force=force)
    return AdapterReport(
        source=source.path,
        source_format=source.format,
        out=out,
        format=to,
        dtype=dtype or source.dtype,
        modules=len(source.modules),
        rank=source.rank,
        bytes=sum(file.stat().st_size for file in out.iterdir()),
        seconds=time.perf_counter() - started,
    )
