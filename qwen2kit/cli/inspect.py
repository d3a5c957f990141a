"""``qwen2kit inspect``: what a checkpoint or preset is, from its files alone; no framework runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen2kit.cli.output import console, emit_json

if TYPE_CHECKING:
    from qwen2kit.spec.model import ModelSpec
    from qwen2kit.weights.checkpoint import Checkpoint


def inspect(
    model: Annotated[
        str, typer.Argument(help="Directory, GGUF file, run directory, hub id or preset name.")
    ],
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Show spec, exact parameter counts, KV cache size, format, tokenizer and stop tokens."""
    from qwen2kit.spec.presets import PRESETS, preset
    from qwen2kit.weights.checkpoint import open_checkpoint

    if model.lower() in PRESETS and not Path(model).exists():
        spec = preset(model)
        document = {"preset": model.lower(), **describe_spec(spec)}
    else:
        document = describe_checkpoint(open_checkpoint(_locate(model)))
    if json_output:
        emit_json(document)
    else:
        _print(document)


def describe_spec(spec: ModelSpec) -> dict[str, Any]:
    """Spec as ``config.json`` fields, parameter counts and cache size."""
    from dataclasses import asdict

    from qwen2kit.spec.counts import count_params, kv_bytes_per_token

    counts = count_params(spec)
    return {
        "model_type": spec.model_type,
        "spec": {key: value for key, value in asdict(spec).items() if value is not None},
        "parameters": {name: getattr(counts, name) for name in counts.__slots__},
        "kv_bytes_per_token": {
            "bfloat16": kv_bytes_per_token(spec, 2),
            "float32": kv_bytes_per_token(spec, 4),
        },
    }


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """`describe_spec` and everything the files say besides.

    Raises:
        TokenizerError: tokenizer files are missing or damaged.
    """
    tokenizer = checkpoint.tokenizer()
    generation = checkpoint.generation
    quantization = checkpoint.quantization
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "adapter": None if checkpoint.adapter is None else str(checkpoint.adapter),
        "dtype": checkpoint.dtype,
        "quantization": None
        if quantization is None
        else {"bits": quantization.bits, "group_size": quantization.group_size},
        "packing": None if checkpoint.packing is None else checkpoint.packing.describe(),
        "notes": list(checkpoint.notes),
        "tensors": len(checkpoint.weights.names()),
        **describe_spec(checkpoint.spec),
        "tokenizer": {
            "vocab_size": tokenizer.vocab_size,
            "embedding_rows": checkpoint.spec.vocab_size,
            "chat_template": tokenizer.chat_template is not None,
            "default_system": None if tokenizer.chat_template is None else tokenizer.default_system,
        },
        "stop_tokens": {
            str(token): _name(tokenizer.vocab_size, token, tokenizer.decode)
            for token in generation.stop_token_ids
        },
        "sampling": {
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": generation.top_k,
            "repetition_penalty": generation.repetition_penalty,
        },
        "ignored_generation_settings": list(generation.ignored),
        "files": _files(checkpoint.path),
    }


def _locate(model: str) -> Path:
    from qwen2kit.errors import WeightError
    from qwen2kit.spec.presets import PRESETS
    from qwen2kit.weights.locate import locate

    try:
        return locate(model)
    except WeightError as error:
        if "/" in model or Path(model).exists():
            raise
        raise WeightError(f"{error}; presets: {', '.join(PRESETS)}") from error


def _name(vocab_size: int, token: int, decode: Any) -> str | None:
    return decode([token]) if token < vocab_size else None


def _files(path: Path) -> dict[str, int]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return {file.name: file.stat().st_size for file in files}


def _print(document: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for key, value in document.items():
        for label, text in _lines(key, value):
            table.add_row(label, Text(text))
    console().print(table)


def _lines(key: str, value: Any) -> list[tuple[str, str]]:
    """One row per scalar; nested mappings get dotted labels."""
    if isinstance(value, dict):
        return [line for name, item in value.items() for line in _lines(f"{key}.{name}", item)]
    if isinstance(value, bool):
        return [(key, "yes" if value else "no")]
    if isinstance(value, int) and not key.endswith("_id"):
        return [(key, f"{value:,}")]
    return [(key, "none" if value in (None, [], ()) else str(value))]
