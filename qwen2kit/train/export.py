"""A trained model as a Hugging Face directory that transformers and mlx-lm load."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.weights.generation import GenerationDefaults
from qwen2kit.weights.safetensors_write import SafetensorsWriter, sync_directory
from qwen2kit.weights.source import TensorInfo
from qwen2kit.weights.tensor import DType


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
    model: CompiledModel, tokenizer: Tokenizer, directory: Path, *, dtype: DType, chat: bool
) -> None:
    """Write ``directory`` (replacing it): config.json, safetensors, tokenizer, generation defaults.

    Tensors stream one at a time; the directory appears under its name only when complete.

    Raises:
        OSError: the disk is full or not writable.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(model, tokenizer, partial, dtype, chat)
        if directory.exists():
            shutil.rmtree(directory)
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(directory.parent)


def _write(
    model: CompiledModel, tokenizer: Tokenizer, directory: Path, dtype: DType, chat: bool
) -> None:
    spec = spec_for_export(model.spec, tokenizer, chat=chat)
    plan = [(param.name, TensorInfo(dtype, param.shape)) for param in schema(spec)]
    with SafetensorsWriter(directory, plan, metadata={"format": "pt"}) as writer:
        for name, tensor in model.export():
            writer.write(name, tensor.astype(dtype))
    tokenizer.save(directory)
    stops = (tokenizer.im_end_id, tokenizer.eot_id)
    generation = GenerationDefaults(stop_token_ids=stops if chat else stops[::-1])
    _write_json(directory / "config.json", to_hf_config(spec, dtype=dtype))
    _write_json(directory / "generation_config.json", generation.to_hf(spec))


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
