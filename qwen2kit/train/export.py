"""A trained model as a Hugging Face directory that transformers and mlx-lm load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from qwen2kit.backend.processes import Processes, SingleProcess
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.partial_file import sync_directory
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.train.agreement import settle
from qwen2kit.weights.generation import GenerationDefaults
from qwen2kit.weights.safetensors_write import SafetensorsWriter
from qwen2kit.weights.source import TensorInfo
from qwen2kit.weights.staging import bring_back, put_in_place
from qwen2kit.weights.tensor import DType, HostTensor


def spec_for_export(spec: ModelSpec, tokenizer: Tokenizer, *, chat: bool) -> ModelSpec:
    """``spec`` with the ids that end a text: ``<|im_end|>`` for a chat model, else
    ``<|endoftext|>``, which also pads."""
    return replace(
        spec,
        bos_token_id=tokenizer.eot_id,
        eos_token_id=tokenizer.im_end_id if chat else tokenizer.eot_id,
        pad_token_id=tokenizer.eot_id,
    )


def export_model(
    model: CompiledModel,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    dtype: DType,
    chat: bool,
    processes: Processes | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Write ``directory`` (replacing it): config.json, safetensors, tokenizer, generation defaults.

    Tensors stream one at a time; the directory appears under its name only when complete. All
    processes call this; process 0 writes.

    Args:
        go_on: called before each tensor, on all processes; what it raises ends the export.

    Raises:
        OSError: the disk is full or not writable.
        PeerError: process 0 failed.
    """
    processes = processes or SingleProcess()
    tensors = _each(model.export(), go_on)
    spec = spec_for_export(model.spec, tokenizer, chat=chat)
    error: OSError | None = None
    if processes.rank == 0:
        try:
            _replace(
                directory, lambda partial: _write(spec, tensors, tokenizer, partial, dtype, chat)
            )
        except OSError as caught:
            error = caught
    # Handing tensors over takes all processes, even if process 0 no longer stores them.
    for _ in tensors:
        pass
    settle(processes, error)


def _each(
    tensors: Iterator[tuple[str, HostTensor]], go_on: Callable[[], None]
) -> Iterator[tuple[str, HostTensor]]:
    for tensor in tensors:
        go_on()
        yield tensor


def _replace(directory: Path, write: Callable[[Path], None]) -> None:
    partial, retired = (
        directory.with_name(f".{directory.name}.{kind}") for kind in ("partial", "replaced")
    )
    bring_back(directory, retired)
    for leftover in (partial, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        put_in_place(partial, directory, retired)
        shutil.rmtree(retired, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(directory.parent)


def _write(
    spec: ModelSpec,
    tensors: Iterator[tuple[str, HostTensor]],
    tokenizer: Tokenizer,
    directory: Path,
    dtype: DType,
    chat: bool,
) -> None:
    plan = [(param.name, TensorInfo(dtype, param.shape)) for param in schema(spec)]
    with SafetensorsWriter(directory, plan, metadata={"format": "pt"}) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor.astype(dtype))
    tokenizer.save(directory)
    stops = (tokenizer.im_end_id, tokenizer.eot_id)
    generation = GenerationDefaults(stop_token_ids=stops if chat else stops[::-1])
    _write_json(directory / "config.json", to_hf_config(spec, dtype=dtype))
    _write_json(directory / "generation_config.json", generation.to_hf(spec))


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
