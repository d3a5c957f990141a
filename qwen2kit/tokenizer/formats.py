"""Tokenizer directories: tokenizer.json, vocab.json + merges.txt, or qwen.tiktoken.

Settings come from tokenizer_config.json; the chat template from chat_template.jinja,
chat_template.json or tokenizer_config.json, in that order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2kit.errors import TokenizerError
from qwen2kit.tokenizer.document import (
    CONTROL_TOKENS,
    AddedToken,
    TokenizerParts,
    qwen2_document,
)
from qwen2kit.tokenizer.tiktoken_file import read_ranks, vocab_and_merges


def parts_from_dir(path: Path) -> TokenizerParts:
    """Read the tokenizer files in ``path``.

    Raises:
        TokenizerError: no tokenizer there, or a file that is damaged (the message names it).
    """
    config_path = path / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    document, origin = _document(path, config, config_path)
    limit = config.get("model_max_length")
    return TokenizerParts(
        document=document,
        origin=str(origin),
        chat_template=_chat_template(path, config),
        eos_token=_token_name(config, "eos_token", config_path),
        pad_token=_token_name(config, "pad_token", config_path),
        bos_token=_token_name(config, "bos_token", config_path),
        model_max_length=int(limit) if isinstance(limit, int | float) else None,
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises TokenizerError that names the file."""
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(
            f"{path}: not valid JSON (line {error.lineno}: {error.msg}); fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TokenizerError(
            f"{path}: not UTF-8 text; the file is damaged, fetch it again"
        ) from None


def _document(
    path: Path, config: Mapping[str, Any], config_path: Path
) -> tuple[dict[str, Any], Path]:
    if (path / "tokenizer.json").is_file():
        return _tokenizer_json(path / "tokenizer.json", config), path / "tokenizer.json"
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        vocab = read_json_object(path / "vocab.json")
        merges = _read_merges(path / "merges.txt")
        origin = path / "vocab.json"
    elif (path / "qwen.tiktoken").is_file():
        origin = path / "qwen.tiktoken"
        vocab, merges = vocab_and_merges(read_ranks(origin), str(origin))
    else:
        raise TokenizerError(
            f"{path}: no tokenizer found; expected tokenizer.json, vocab.json with merges.txt, "
            "or qwen.tiktoken"
        )
    added = _added_tokens(config, config_path)
    if added is None:
        added = [AddedToken(len(vocab) + i, name) for i, name in enumerate(CONTROL_TOKENS)]
    return qwen2_document(vocab, merges, added), origin


def _tokenizer_json(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {"added_tokens": [], **read_json_object(path)}
    # transformers, converting from GGUF, writes no normalizer, but its Qwen2Tokenizer class
    # applies NFC whatever the file says.
    is_qwen2 = str(config.get("tokenizer_class", "")).startswith("Qwen2Tokenizer")
    if is_qwen2 and document.get("normalizer") is None:
        document["normalizer"] = {"type": "NFC"}
    return document


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = _read_text(path).split("\n")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise TokenizerError(f"{path}: line {number} is not two tokens with a space between")
        merges.append((parts[0], parts[1]))
    return merges


def _added_tokens(config: Mapping[str, Any], path: Path) -> list[AddedToken] | None:
    entries = config.get("added_tokens_decoder")
    if entries is None:
        return None
    try:
        return [
            AddedToken(int(index), str(entry["content"]), bool(entry.get("special", False)))
            for index, entry in entries.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise TokenizerError(
            f"{path}: added_tokens_decoder must map ids to {{content, special}} entries"
        ) from None


def _token_name(config: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise TokenizerError(f"{path}: {key} must be a token or null, got {value!r}")


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    jinja, packed = path / "chat_template.jinja", path / "chat_template.json"
    if jinja.is_file():
        return _read_text(jinja)
    if packed.is_file():
        return _one_template(read_json_object(packed).get("chat_template"), packed)
    return _one_template(config.get("chat_template"), path / "tokenizer_config.json")


def _one_template(value: object, path: Path) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {e.get("name"): e.get("template") for e in value if isinstance(e, dict)}
        if isinstance(named.get("default"), str):
            return str(named["default"])
    raise TokenizerError(f"{path}: chat_template must be a string or hold one named 'default'")
