"""Write tokenizer.json and tokenizer_config.json as transformers and mlx-lm expect them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.tokenizer.document import ENDOFTEXT, TokenizerParts

if TYPE_CHECKING:
    import tokenizers


def write_tokenizer(directory: Path, encoder: tokenizers.Tokenizer, parts: TokenizerParts) -> None:
    """Write both files into ``directory`` (created if absent), each one atomically.

    Separate template files left there by an earlier save are removed: they would take precedence
    over the template in tokenizer_config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "tokenizer.json", encoder.to_str(pretty=True))
    config = json.dumps(_config(encoder, parts), indent=2, ensure_ascii=False)
    _write(directory / "tokenizer_config.json", config + "\n")
    for stale in ("chat_template.jinja", "chat_template.json"):
        (directory / stale).unlink(missing_ok=True)


def _config(encoder: tokenizers.Tokenizer, parts: TokenizerParts) -> dict[str, Any]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = encoder.get_added_tokens_decoder()
    config: dict[str, Any] = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {flag: getattr(token, flag) for flag in flags}
            for index, token in sorted(added.items())
        },
        "bos_token": parts.bos_token,
        "clean_up_tokenization_spaces": False,
        "eos_token": parts.eos_token or ENDOFTEXT,
        "errors": "replace",
        "pad_token": parts.pad_token or ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if parts.chat_template is not None:
        config["chat_template"] = parts.chat_template
    if parts.model_max_length is not None:
        config["model_max_length"] = parts.model_max_length
    return config


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
