"""Checkpoint: a model on disk, whatever its format, opened and checked but not loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen2kit.errors import Qwen2KitError, WeightError
from qwen2kit.spec.hf import from_hf_config
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import FINAL_NORM
from qwen2kit.weights.generation import GenerationDefaults, read_generation
from qwen2kit.weights.hf_layout import open_weights, read_json
from qwen2kit.weights.locate import ADAPTER_CONFIG
from qwen2kit.weights.match import check_fits
from qwen2kit.weights.mlx_layout import MlxSource, is_mlx
from qwen2kit.weights.packed_layout import PackedSource
from qwen2kit.weights.packing import Packing, read_packing
from qwen2kit.weights.quantization import Quantization, read_quantization
from qwen2kit.weights.source import WeightSource
from qwen2kit.weights.tensor import FLOAT_DTYPES, DType

if TYPE_CHECKING:
    from qwen2kit.tokenizer.bpe import Tokenizer

Format = Literal["hf", "mlx", "gguf", "awq", "gptq"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: directory, or the ``.gguf`` file.
        format: on-disk layout.
        spec: what it computes.
        weights: its tensors by canonical name; they fit ``spec``.
        dtype: stored float dtype: of the scales where MLX packs weights, bfloat16 for GGUF block
            types.
        quantization: MLX affine settings, or None. GGUF block types are per tensor and not here.
            For AWQ and GPTQ: those that keep the weights exactly as they are packed.
        generation: stop ids and sampling defaults.
        adapter: directory of the LoRA adapter that ``weights`` include, or None.
        packing: the AWQ or GPTQ encoding, or None.
        notes: what a user should know about how the weights are read.
    """

    path: Path
    format: Format
    spec: ModelSpec
    weights: WeightSource
    dtype: DType
    quantization: Quantization | None
    generation: GenerationDefaults
    load_tokenizer: Callable[[], Tokenizer] = field(repr=False, compare=False)
    adapter: Path | None = None
    packing: Packing | None = None
    notes: tuple[str, ...] = ()

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer that belongs to the model. Raises TokenizerError."""
        return self.load_tokenizer()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model directory (HF or MLX layout, AWQ or GPTQ) or a ``.gguf`` file.

    An adapter directory is opened together with the base model that it names.

    Raises:
        ConfigError: config.json or the GGUF metadata is not a supported Qwen2-family model.
        WeightError: weights are missing, damaged, in an unsupported encoding, or do not fit.
    """
    if path.is_dir():
        return _open_directory(path)
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    raise WeightError(f"{path}: neither a model directory nor a .gguf file")


def _open_directory(path: Path) -> Checkpoint:
    config_path = path / "config.json"
    if (path / ADAPTER_CONFIG).is_file() and not config_path.is_file():
        from qwen2kit.adapters.merge import open_on_base

        return open_on_base(path)
    if not config_path.is_file():
        raise WeightError(f"{path}: no config.json; this is not a model directory")
    config = read_json(config_path)
    try:
        packing = read_packing(config)
        spec = from_hf_config(config)
        files = _open_layout(path, config, spec, packing)
        check_fits(spec, files.weights)
    except Qwen2KitError as error:
        raise type(error)(_with_path(path, str(error))) from error
    tokenizer = cache(lambda: _tokenizer_from_dir(path))
    return Checkpoint(
        path=path,
        format=files.format,
        spec=spec,
        weights=files.weights,
        dtype=_float_dtype(path, files.weights),
        quantization=files.quantization,
        generation=read_generation(path, spec, tokenizer),
        load_tokenizer=tokenizer,
        packing=packing,
        notes=files.weights.notes() if isinstance(files.weights, PackedSource) else (),
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    format: Format
    weights: WeightSource
    quantization: Quantization | None


def _open_layout(
    path: Path, config: Mapping[str, Any], spec: ModelSpec, packing: Packing | None
) -> _Layout:
    if packing is not None:
        packed = PackedSource(spec, open_weights(path), packing)
        return _Layout(packing.method, packed, packed.quantization(spec))
    quantization = read_quantization(config)
    files = open_weights(path)
    if quantization is not None or is_mlx(files):
        return _Layout("mlx", MlxSource(spec, files, quantization), quantization)
    return _Layout("hf", files, None)


def _open_gguf(path: Path) -> Checkpoint:
    from qwen2kit.weights.gguf_read import generation_from_gguf, open_gguf

    spec, weights = open_gguf(path)
    fields = weights.file.fields
    try:
        check_fits(spec, weights)
    except WeightError as error:
        raise WeightError(_with_path(path, str(error))) from error

    def tokenizer() -> Tokenizer:
        from qwen2kit.tokenizer.bpe import Tokenizer

        return Tokenizer.from_gguf(fields)

    return Checkpoint(
        path=path,
        format="gguf",
        spec=spec,
        weights=weights,
        dtype=weights.dtype,
        quantization=None,
        generation=generation_from_gguf(fields, spec),
        load_tokenizer=tokenizer,
    )


def _tokenizer_from_dir(path: Path) -> Tokenizer:
    from qwen2kit.tokenizer.bpe import Tokenizer

    return Tokenizer.from_dir(path)


def _float_dtype(path: Path, weights: WeightSource) -> DType:
    dtype = weights.info(FINAL_NORM).dtype
    if dtype not in FLOAT_DTYPES:
        raise WeightError(f"{path}: weights are {dtype}; expected one of {', '.join(FLOAT_DTYPES)}")
    return dtype


def _with_path(path: Path, message: str) -> str:
    return message if message.startswith(str(path)) else f"{path}: {message}"
