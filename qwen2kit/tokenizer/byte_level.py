"""The byte <-> character table of byte-level BPE.

Vocabulary files are text, tokens are bytes. Printable Latin-1 bytes stand for themselves; the
other 68 bytes are shown as U+0100 onwards, in byte order (GPT-2, Radford et al. 2019, encoder).
"""

from __future__ import annotations

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = tuple(byte for byte in range(256) if byte not in _PRINTABLE)

BYTE_TO_CHAR: dict[int, str] = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + index) for index, byte in enumerate(_HIDDEN)
}
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_chars(data: bytes) -> str:
    """Token bytes as they are spelled in vocabulary and merge files."""
    return "".join(BYTE_TO_CHAR[byte] for byte in data)


def to_bytes(token: str) -> bytes:
    """The bytes behind a spelled token. Raises KeyError for a character outside the table."""
    return bytes(CHAR_TO_BYTE[char] for char in token)
