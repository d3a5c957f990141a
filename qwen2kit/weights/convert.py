"""Conversion between Hugging Face, MLX and GGUF checkpoints, streaming tensor by tensor."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from qwen2kit.errors import ConfigError
from qwen2kit.partial_file import write_text_atomically
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.schema import schema
from qwen2kit.weights.checkpoint import Checkpoint, Format
from qwen2kit.weights.gguf_write import GGUF_TYPES, GgufType, write_gguf
from qwen2kit.weights.hf_layout import read_json
from qwen2kit.weights.quantization import Quantization
from qwen2kit.weights.safetensors_convert import write_hf_weights, write_mlx_weights
from qwen2kit.weights.safetensors_write import DEFAULT_MAX_SHARD_BYTES
from qwen2kit.weights.staging import refuse_overwrite, staged_directory
from qwen2kit.weights.tensor import FLOAT_DTYPES, DType

RECORD_NAME = "qwen2kit.json"
Target = Literal["hf", "mlx", "gguf"]
Progress = Callable[[str], None]
_GGUF_OF: dict[DType, GgufType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What a conversion wrote.

    Attributes:
        source, out: paths.
        adapter: LoRA adapter that was merged, or None.
        source_format, format: layouts.
        dtype: float dtype of dense tensors (of scales where quantised).
        quantization: ``"4-bit, groups of 64"``, a GGUF type, or None.
        tensors: canonical parameters.
        bytes: size of everything written.
        seconds: wall time.
        sha256: of every stored tensor's bytes, by stored name.
    """

    source: Path
    source_format: Format
    out: Path
    format: Target
    dtype: DType
    quantization: str | None
    tensors: int
    bytes: int
    seconds: float
    sha256: dict[str, str] = field(repr=False)
    adapter: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the per-tensor sums."""
        values = asdict(self)
        del values["sha256"]
        paths = {key: values[key] for key in ("source", "out", "adapter")}
        return values | {key: None if path is None else str(path) for key, path in paths.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    source: Checkpoint
    dtype: DType
    quantization: Quantization | None
    gguf_type: GgufType | None
    max_shard_bytes: int
    progress: Progress


def convert(
    source: Checkpoint,
    out: Path,
    *,
    to: Target,
    dtype: DType | None = None,
    quantize_bits: int | None = None,
    group_size: int = 64,
    gguf_type: GgufType | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    force: bool = False,
    progress: Progress = lambda name: None,
) -> ConversionReport:
    """Write ``source`` in another layout or dtype.

    Args:
        source: an opened checkpoint of any format.
        out: a directory (hf, mlx) or a ``.gguf`` file; appears only when complete.
        to: target layout.
        dtype: float dtype; by default the source's (bfloat16 for GGUF block types).
        quantize_bits: MLX only: pack matrices and embedding to this many bits. Without it, AWQ
            and GPTQ weights that MLX can hold exactly stay packed; all others become dense.
        group_size: MLX only: values that share a scale.
        gguf_type: GGUF only: type of the matrices; by default that of ``dtype``.
        max_shard_bytes: size limit of one safetensors file.
        force: replace an existing model at ``out``.
        progress: called with each stored tensor's name before it is written.

    Raises:
        ConfigError: options contradict each other, or ``out`` may not be written.
        WeightError, TokenizerError: the source is damaged or lacks a tokenizer.
    """
    started = time.perf_counter()
    job = _job(source, to, dtype, quantize_bits, group_size, gguf_type, max_shard_bytes, progress)
    _check_paths(source, out, to)
    if to == "gguf":
        sums = _to_gguf(job, out, force)
    else:
        with staged_directory(out, force=force) as staging:
            sums = _to_directory(job, staging, to)
    files = [out] if out.is_file() else [path for path in out.iterdir() if path.is_file()]
    return ConversionReport(
        source=source.path,
        source_format=source.format,
        out=out,
        format=to,
        dtype=job.dtype,
        quantization=_describe(job),
        tensors=len(schema(source.spec)),
        bytes=sum(path.stat().st_size for path in files),
        seconds=time.perf_counter() - started,
        sha256=sums,
        adapter=source.adapter,
    )


def amend_record(out: Path, **entries: Any) -> None:
    """Add ``entries`` to the record of the conversion that wrote ``out``."""
    path = out / RECORD_NAME if out.is_dir() else out.with_name(f"{out.name}.{RECORD_NAME}")
    _write_json(path, read_json(path) | entries)


def _job(
    source: Checkpoint,
    to: Target,
    dtype: DType | None,
    bits: int | None,
    group_size: int,
    gguf_type: GgufType | None,
    max_shard_bytes: int,
    progress: Progress,
) -> _Job:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype!r}")
    if bits is not None and to != "mlx":
        raise ConfigError("quantising to --bits is for --to mlx; for GGUF use --gguf-type q8_0")
    if gguf_type is not None and (to != "gguf" or gguf_type not in GGUF_TYPES):
        raise ConfigError(f"--gguf-type is one of {', '.join(GGUF_TYPES)} and needs --to gguf")
    if gguf_type is not None and dtype is not None and _GGUF_OF[dtype] != gguf_type:
        raise ConfigError("give either --dtype or --gguf-type, they contradict each other")
    if max_shard_bytes <= 0:
        raise ConfigError(f"the shard size must be positive, got {max_shard_bytes}")
    stored = dtype or source.dtype
    return _Job(
        source=source,
        dtype=stored,
        quantization=_quantization(source, to, bits, group_size),
        gguf_type=(gguf_type or _GGUF_OF[stored]) if to == "gguf" else None,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def _quantization(
    source: Checkpoint, to: Target, bits: int | None, group_size: int
) -> Quantization | None:
    if bits is not None:
        return Quantization(bits, group_size)
    as_packed = to == "mlx" and source.packing is not None and source.adapter is None
    return source.quantization if as_packed else None


def _check_paths(source: Checkpoint, out: Path, to: Target) -> None:
    if to == "gguf" and out.suffix.lower() != ".gguf":
        raise ConfigError(f"{out}: a GGUF output needs a name that ends in .gguf")
    if to != "gguf" and out.suffix.lower() == ".gguf":
        raise ConfigError(f"{out}: ends in .gguf but the target is {to}; use --to gguf")
    resolved, origin = out.resolve(), source.path.resolve()
    if resolved == origin or resolved in origin.parents:
        raise ConfigError(f"{out}: is or contains the source; choose another output")


def _to_gguf(job: _Job, out: Path, force: bool) -> dict[str, str]:
    refuse_overwrite(out, force=force)
    if out.is_dir():
        raise ConfigError(f"{out}: is a directory; choose a file name for the GGUF output")
    assert job.gguf_type is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    sums = write_gguf(job.source, out, job.gguf_type, job.progress)
    _write_json(out.with_name(f"{out.name}.{RECORD_NAME}"), _record(job, sums))
    return sums


def _to_directory(job: _Job, staging: Path, to: Target) -> dict[str, str]:
    source, spec = job.source, job.source.spec
    source.tokenizer().save(staging, model_max_length=spec.max_position_embeddings)
    if to == "hf":
        sums = write_hf_weights(
            spec,
            source.weights,
            staging,
            dtype=job.dtype,
            max_shard_bytes=job.max_shard_bytes,
            progress=job.progress,
        )
    else:
        sums = write_mlx_weights(
            spec,
            source.weights,
            staging,
            dtype=job.dtype,
            quantization=job.quantization,
            max_shard_bytes=job.max_shard_bytes,
            progress=job.progress,
        )
    config = to_hf_config(spec, dtype=job.dtype)
    if job.quantization is not None:
        settings = job.quantization.to_config()
        config |= {"quantization": settings, "quantization_config": settings}
    _write_json(staging / "config.json", config)
    _write_json(staging / "generation_config.json", source.generation.to_hf(spec))
    _write_json(staging / RECORD_NAME, _record(job, sums))
    return sums


def _record(job: _Job, sums: dict[str, str]) -> dict[str, Any]:
    packages = {}
    for name in ("qwen2kit", "numpy", "tokenizers", "gguf"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "unknown"
    return {
        "kind": "conversion",
        "schema_version": 1,
        "source": {
            "path": str(job.source.path),
            "format": job.source.format,
            "adapter": None if job.source.adapter is None else str(job.source.adapter),
        },
        "dtype": job.dtype,
        "quantization": _describe(job),
        "versions": {"python": platform.python_version(), **packages},
        "sha256": sums,
    }


def _describe(job: _Job) -> str | None:
    if job.quantization is not None:
        return f"{job.quantization.bits}-bit, groups of {job.quantization.group_size}"
    return job.gguf_type


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_text_atomically(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
