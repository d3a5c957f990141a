"""Tokenizers for these tests: a small one trained here, and the real model's where present."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.train_bbpe import train_bbpe
from qwen2kit.weights.checkpoint import open_checkpoint

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
def real(real_gguf: Path) -> Tokenizer:
    """The real model's tokenizer, read from GGUF."""
    return open_checkpoint(real_gguf).tokenizer()
