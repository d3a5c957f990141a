"""A tokenizer as GGUF metadata values (``tokenizer.ggml.*``), one entry per embedding row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qwen2kit.errors import TokenizerError
from qwen2kit.weights.hf_layout import read_json

if TYPE_CHECKING:
    from qwen2kit.tokenizer.bpe import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """Token strings, their types and the merges (``"left right"``), in id order."""

    tokens: list[str]
    types: list[int]
    merges: list[str]


def gguf_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> GgufVocabulary:
    """The vocabulary padded to the ``vocab_size`` rows of the embedding.

    Rows without a token become ``[PADn]`` of the unused type, as llama.cpp names them.

    Raises:
        TokenizerError: a token id has no embedding row.
    """
    with TemporaryDirectory(prefix="qwen2kit-") as folder:
        tokenizer.save(Path(folder))
        document = read_json(Path(folder) / "tokenizer.json")
    model, added = document["model"], document["added_tokens"]
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    rows = [(index, token, _NORMAL) for token, index in model["vocab"].items()]
    rows += [(entry["id"], entry["content"], _kind(entry)) for entry in added]
    for index, token, kind in rows:
        if index >= vocab_size:
            raise TokenizerError(
                f"token {token!r} has id {index}, but the embedding has {vocab_size} rows; the "
                "tokenizer belongs to another model"
            )
        tokens[index], types[index] = token, kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return GgufVocabulary(tokens, types, merges)


def _kind(entry: Mapping[str, Any]) -> int:
    return _CONTROL if entry.get("special") else _USER_DEFINED
