"""GGUF writing: F32, F16, BF16 or Q8_0, tensor by tensor, with tokenizer and chat template.

The tensor table is written first, so peak memory is one tensor. As llama.cpp does, vectors and
routers stay F32, and a matrix whose rows do not divide into blocks falls back to F16.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from qwen2kit.errors import ConfigError
from qwen2kit.partial_file import sync_directory
from qwen2kit.weights.checkpoint import Checkpoint
from qwen2kit.weights.generation import END_TOKENS
from qwen2kit.weights.gguf_names import GgufSlot, gguf_slots
from qwen2kit.weights.gguf_spec import ARCHITECTURES, spec_to_gguf
from qwen2kit.weights.gguf_tokenizer import GgufVocabulary, gguf_vocabulary
from qwen2kit.weights.source import WeightSource
from qwen2kit.weights.tensor import DType, HostTensor

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from numpy.typing import NDArray

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
GGUF_TYPES: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")
_ROWS_PER_STEP_ELEMENTS = 1 << 22
_DENSE: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Row:
    slot: GgufSlot
    type: GGMLQuantizationType
    nbytes: int


def write_gguf(
    source: Checkpoint, path: Path, gguf_type: GgufType, progress: Progress = lambda name: None
) -> dict[str, str]:
    """Write ``source`` to ``path``, which appears only when complete.

    Args:
        source: any checkpoint.
        path: the ``.gguf`` file.
        gguf_type: type of the matrices.
        progress: called with each tensor's name before it is written.

    Returns:
        sha256 of every tensor's bytes, by GGUF name.

    Raises:
        ConfigError: GGUF cannot express the spec.
        TokenizerError: the checkpoint has no usable tokenizer.
    """
    from gguf import GGUFWriter

    metadata = spec_to_gguf(source.spec)
    tokenizer = source.tokenizer()
    vocabulary = gguf_vocabulary(tokenizer, source.spec.vocab_size)
    rows = list(_rows(source, gguf_type))
    temporary = path.with_name(f".{path.name}.partial")
    writer = GGUFWriter(temporary, ARCHITECTURES[source.spec.model_type])
    try:
        _add_general(writer, source, gguf_type)
        _add_model(writer, metadata)
        _add_tokenizer(writer, source, vocabulary, tokenizer.chat_template)
        _write_head(writer, rows)
        with temporary.open("ab") as file:
            sums = _write_tensors(file, writer.data_alignment, source.weights, rows, progress)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            writer.close()
        temporary.unlink(missing_ok=True)
        raise
    return sums


def _rows(source: Checkpoint, gguf_type: GgufType) -> Iterator[_Row]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[gguf_type.upper()]
    for slot in gguf_slots(source.spec):
        kind = wanted
        if len(slot.shape) == 1 or slot.params[0].kind == "router":
            kind = GGMLQuantizationType.F32
        elif slot.shape[-1] % GGML_QUANT_SIZES[wanted][0]:
            kind = GGMLQuantizationType.F16
        block, block_bytes = GGML_QUANT_SIZES[kind]
        yield _Row(slot, kind, prod(slot.shape) // block * block_bytes)


def _add_general(writer: GGUFWriter, source: Checkpoint, gguf_type: GgufType) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    file_types = {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "bf16": LlamaFileType.MOSTLY_BF16,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_type("model")
    writer.add_name(source.path.stem if source.format == "gguf" else source.path.name)
    writer.add_file_type(file_types[gguf_type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    generation = source.generation
    if generation.temperature > 0:
        writer.add_float32("general.sampling.temp", generation.temperature)
        writer.add_float32("general.sampling.top_p", generation.top_p)
        writer.add_int32("general.sampling.top_k", generation.top_k)
    if generation.repetition_penalty != 1:
        writer.add_float32("general.sampling.penalty_repeat", generation.repetition_penalty)


def _add_model(writer: GGUFWriter, metadata: dict[str, Any]) -> None:
    for suffix, value in metadata.items():
        key = f"{writer.arch}.{suffix}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)


def _add_tokenizer(
    writer: GGUFWriter, source: Checkpoint, vocabulary: GgufVocabulary, template: str | None
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    spec, stops = source.spec, list(source.generation.stop_token_ids)
    eos = spec.eos_token_id[0] if isinstance(spec.eos_token_id, tuple) else spec.eos_token_id
    if eos not in stops and stops:
        eos = stops[0]
    # Readers find the family's end tokens by name where there is a chat template.
    named = END_TOKENS if template is not None else ()
    others = [i for i in stops if i != eos and vocabulary.tokens[i] not in named]
    ids = {
        "bos": spec.bos_token_id,
        "eos": eos,
        "padding": spec.pad_token_id,
        "eot": others[0] if others else None,
    }
    for name, token in ids.items():
        if token is not None and 0 <= token < spec.vocab_size:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def _write_head(writer: GGUFWriter, rows: list[_Row]) -> None:
    import numpy as np

    for row in rows:
        writer.add_tensor_info(
            row.slot.name, row.slot.shape, np.dtype(np.float32), row.nbytes, raw_dtype=row.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_tensors(
    file: BinaryIO, alignment: int, weights: WeightSource, rows: list[_Row], progress: Progress
) -> dict[str, str]:
    """Append the data, every tensor at a multiple of ``alignment``; returns sha256 by name.

    The library's own ``write_tensor_data`` reports a full disk without saying that it is one.
    """
    import numpy as np

    sums: dict[str, str] = {}
    for row in rows:
        progress(row.slot.name)
        parts = [_encode(weights.read(param.name), row.type) for param in row.slot.params]
        data = parts[0] if len(parts) == 1 else np.concatenate(parts)
        file.write(bytes(-file.tell() % alignment))
        file.write(data.data)
        sums[row.slot.name] = hashlib.sha256(data.data).hexdigest()
    file.write(bytes(-file.tell() % alignment))
    return sums


def _encode(tensor: HostTensor, kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """The tensor's bytes in a GGML type."""
    import numpy as np
    from gguf.quants import quantize

    if kind.name in _DENSE:
        return np.frombuffer(tensor.astype(_DENSE[kind.name]).data, dtype=np.uint8)
    width = tensor.shape[-1]
    matrix = HostTensor(tensor.dtype, (prod(tensor.shape) // width, width), tensor.data)
    step = max(1, _ROWS_PER_STEP_ELEMENTS // width)
    parts = []
    for start in range(0, matrix.shape[0], step):
        values = matrix.slice(start, start + step).float32()
        if not np.isfinite(values).all():
            raise ConfigError("cannot quantise: the weights contain NaN or infinity")
        parts.append(quantize(values, kind).reshape(-1))
    return np.concatenate(parts)
