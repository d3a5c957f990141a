"""The one internal form every tokenizer format is read into: a tokenizer.json document.

Readers produce `TokenizerParts`; `compile_document` checks the document and hands it to the
`tokenizers` library. The Qwen2 pipeline is NFC, the split regex below, byte-level BPE without
unknown token, and no post-processing (no BOS is ever added).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen2kit.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (ENDOFTEXT, IM_START, IM_END)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token outside the BPE vocabulary, matched verbatim before pre-tokenization.

    Attributes:
        special: control token (dropped by ``skip_special``); False for e.g. ``<tool_call>``.
    """

    id: int
    content: str
    special: bool = True

    def as_json(self) -> dict[str, Any]:
        """The entry of tokenizer.json's ``added_tokens``."""
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"id": self.id, "content": self.content, **flags, "special": self.special}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """What a tokenizer directory, GGUF header or training run amounts to.

    Attributes:
        document: a tokenizer.json document.
        origin: where it was read from, for error messages.
        chat_template: the checkpoint's own template, None if it has none.
        model_max_length: in tokens; None if not stated.
    """

    document: dict[str, Any]
    origin: str
    chat_template: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    bos_token: str | None = None
    model_max_length: int | None = None


def qwen2_document(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[AddedToken],
) -> dict[str, Any]:
    """The tokenizer.json document of a Qwen2 tokenizer with these contents."""
    split = {
        "type": "Split",
        "pattern": {"Regex": PRETOKENIZE_REGEX},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.as_json() for token in sorted(added, key=lambda t: t.id)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [list(pair) for pair in merges],
        },
    }


def is_padding_name(token: str, index: int) -> bool:
    """Whether a vocabulary entry only names an untrained embedding row (``[PAD151665]``)."""
    return token == f"[PAD{index}]"


def compile_document(document: dict[str, Any], origin: str) -> tokenizers.Tokenizer:
    """The encoder for a tokenizer.json document.

    Names of untrained padding rows are dropped from the vocabulary, truncation and padding
    settings are ignored (both belong to batching, not to the tokenizer).

    Raises:
        TokenizerError: not a byte-level BPE document, or ids that contradict each other.
    """
    import tokenizers

    _check(document, origin)
    model = document["model"]
    vocab = {t: i for t, i in model["vocab"].items() if not is_padding_name(t, i)}
    slim = {**document, "truncation": None, "padding": None, "model": {**model, "vocab": vocab}}
    try:
        built = tokenizers.Tokenizer.from_str(json.dumps(slim, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception for every malformed document
        raise TokenizerError(f"{origin}: not a usable tokenizer: {error}") from None
    for entry in document["added_tokens"]:
        if built.token_to_id(entry["content"]) != entry["id"]:
            raise TokenizerError(
                f"{origin}: added token {entry['content']!r} has id {entry['id']}, which "
                f"does not follow the vocabulary of {len(vocab)}; the files do not belong together"
            )
    return built


def _check(document: dict[str, Any], origin: str) -> None:
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"{origin}: the tokenizer model is not BPE")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
        raise TokenizerError(f"{origin}: the vocabulary must map tokens to integer ids")
    if len(set(vocab.values())) != len(vocab):
        raise TokenizerError(f"{origin}: two vocabulary entries share an id")
    if not re.search(r'"type":\s*"ByteLevel"', json.dumps(document.get("decoder"))):
        raise TokenizerError(f"{origin}: not a byte-level tokenizer; Qwen2 models need one")
    added = document.get("added_tokens", [])
    if not isinstance(added, list) or not all(
        isinstance(e, dict) and isinstance(e.get("content"), str) and isinstance(e.get("id"), int)
        for e in added
    ):
        raise TokenizerError(f"{origin}: added_tokens must be a list of {{id, content}} entries")
