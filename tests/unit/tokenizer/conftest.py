"""Tokenizers for these tests: a small one trained here, and the real model's where present."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.train_bbpe import train_bbpe

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 tokens, isn't it? DON'T SHOUT.",
    "def is_prime(n):\n    return n > 1 and all(n % i for i in range(2, n))\n\n\nprint(7)\r\n",
    "你好，世界。我们今天学习分词。 Größe, café, naïve — “quotes” … 🎉👩‍👩‍👧 नमस्ते",
    "user assistant system You are a helpful assistant. tool_call arguments name function",
] * 3


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """480 ids trained on a few multilingual lines."""
    return train_bbpe(CORPUS, 480)


@pytest.fixture(scope="session")
def gguf_fields(real_gguf: Path) -> dict[str, Any]:
    """The real model's GGUF metadata as plain values."""
    gguf = pytest.importorskip("gguf")
    return {key: field.contents() for key, field in gguf.GGUFReader(real_gguf).fields.items()}


@pytest.fixture(scope="session")
def real(gguf_fields: dict[str, Any]) -> Tokenizer:
    """The real model's tokenizer, read from GGUF."""
    return Tokenizer.from_gguf(gguf_fields)
