"""A tokenizer out of GGUF metadata (`tokenizer.ggml.*`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen2kit.errors import TokenizerError
from qwen2kit.tokenizer.document import (
    AddedToken,
    TokenizerParts,
    is_padding_name,
    qwen2_document,
)

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_ORIGIN = "GGUF metadata"


def parts_from_gguf(fields: Mapping[str, object]) -> TokenizerParts:
    """Read the tokenizer from plain-valued GGUF fields.

    Token types: 1 is a BPE token, 3 a control token, 4 user-defined (``<tool_call>``), 5 and
    names like ``[PAD151665]`` are untrained embedding rows and are left out.

    Raises:
        TokenizerError: a field is missing or malformed, or not a Qwen2 tokenizer.
    """
    for key, wanted in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "qwen2")):
        if fields.get(key) != wanted:
            found = repr(fields[key]) if key in fields else "missing"
            raise TokenizerError(f"{_ORIGIN}: {key} is {found}; a Qwen2 tokenizer has {wanted!r}")
    tokens = _strings(fields, "tokenizer.ggml.tokens")
    vocab, added = _split_tokens(tokens, _types(fields, len(tokens)))
    merges = [_pair(merge) for merge in _strings(fields, "tokenizer.ggml.merges")]
    template = fields.get("tokenizer.chat_template")
    context = fields.get("qwen2.context_length", fields.get("qwen2moe.context_length"))
    return TokenizerParts(
        document=qwen2_document(vocab, merges, added),
        origin=_ORIGIN,
        chat_template=template if isinstance(template, str) else None,
        eos_token=_named(fields, "tokenizer.ggml.eos_token_id", tokens),
        pad_token=_named(fields, "tokenizer.ggml.padding_token_id", tokens),
        model_max_length=context if isinstance(context, int) else None,
    )


def _split_tokens(
    tokens: Sequence[str], types: Sequence[int]
) -> tuple[dict[str, int], list[AddedToken]]:
    vocab: dict[str, int] = {}
    added: list[AddedToken] = []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _UNUSED or is_padding_name(token, index):
            continue
        if kind == _NORMAL:
            vocab[token] = index
        elif kind in (_CONTROL, _USER_DEFINED):
            added.append(AddedToken(index, token, special=kind == _CONTROL))
        else:
            raise TokenizerError(
                f"{_ORIGIN}: token {index} has type {kind}, which byte-level BPE does not know"
            )
    return vocab, added


def _strings(fields: Mapping[str, object], key: str) -> list[str]:
    values = fields.get(key)
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TokenizerError(f"{_ORIGIN}: {key} is missing or empty")
    if not all(isinstance(value, str) for value in values):
        raise TokenizerError(f"{_ORIGIN}: {key} must hold strings only")
    return list(values)


def _types(fields: Mapping[str, object], count: int) -> list[int]:
    values = fields.get("tokenizer.ggml.token_type")
    if not isinstance(values, Sequence) or len(values) != count:
        raise TokenizerError(
            f"{_ORIGIN}: tokenizer.ggml.token_type must have one entry for each of {count} tokens"
        )
    return [int(value) for value in values]


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right) or " " in right:
        raise TokenizerError(f"{_ORIGIN}: merge {merge!r} is not two tokens with a space between")
    return left, right


def _named(fields: Mapping[str, object], key: str, tokens: Sequence[str]) -> str | None:
    index = fields.get(key)
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise TokenizerError(f"{_ORIGIN}: {key} {index!r} is outside the {len(tokens)} tokens")
    return tokens[index]
