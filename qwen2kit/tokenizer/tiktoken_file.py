"""`qwen.tiktoken`: one "base64(token bytes) rank" per line, ranks 0 upwards, no merge list."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from qwen2kit.errors import TokenizerError
from qwen2kit.tokenizer.byte_level import to_chars


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank.

    Raises:
        TokenizerError: a malformed line, a repeated token, or ranks that are not 0..n-1.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            value = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"{path}: line {number} is not 'base64 rank'; the file is damaged, fetch it again"
            ) from None
        if not token or token in ranks:
            raise TokenizerError(f"{path}: line {number} holds an empty or repeated token")
        ranks[token] = value
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path}: ranks are not 0 to {len(ranks) - 1}; the file is incomplete")
    return ranks


def vocab_and_merges(
    ranks: Mapping[bytes, int], origin: str
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merge list that encode exactly as the ranks do.

    The merge that made a token is found by running BPE on the token's own bytes with only the
    ranks below its own: the two parts that remain are its merge.

    Raises:
        TokenizerError: a byte is missing, or a token that no pair of earlier tokens makes.
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{origin}: no token for byte {missing[0]}; the file is incomplete")
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    merges: list[tuple[str, str]] = []
    for token, rank in ordered:
        if len(token) == 1:
            continue
        parts = _replay(ranks, token, rank)
        if len(parts) != 2:
            raise TokenizerError(
                f"{origin}: token of rank {rank} is not a merge of two earlier tokens; "
                "the file is damaged"
            )
        merges.append((to_chars(parts[0]), to_chars(parts[1])))
    return {to_chars(token): rank for token, rank in ordered}, merges


def _replay(ranks: Mapping[bytes, int], token: bytes, below: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = ((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
        rank, index = min(candidates)
        if rank >= below:
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts
