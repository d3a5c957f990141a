"""Prompts to time: text where there is a tokenizer, any ids where there is none, never the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qwen2kit.bench.measure import Prompts
    from qwen2kit.tokenizer.bpe import Tokenizer

_CONTEXT = 512


def random_prompts(vocab_size: int) -> Prompts:
    """Uniform ids below ``vocab_size``."""
    random = np.random.default_rng(0)
    return lambda length: tuple(random.integers(0, vocab_size, length).tolist())


def text_prompts(tokenizer: Tokenizer) -> Prompts:
    """The kit's held-out passages, read round and round from another place each time; so longer
    prompts than some thousand tokens repeat themselves."""
    from qwen2kit.parity.passages import held_out

    windows = held_out(tokenizer, context=_CONTEXT)
    ids = np.array([token for window in windows for token in window.tokens])
    random = np.random.default_rng(0)

    def prompt(length: int) -> tuple[int, ...]:
        place = int(random.integers(len(ids)))
        return tuple(ids[(place + np.arange(length)) % len(ids)].tolist())

    return prompt
