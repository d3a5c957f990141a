"""Train a byte-level BPE tokenizer of the Qwen2 kind from text."""

from __future__ import annotations

import json
from collections.abc import Iterable

from qwen2kit.errors import TokenizerError
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.byte_level import BYTE_TO_CHAR
from qwen2kit.tokenizer.document import (
    CONTROL_TOKENS,
    ENDOFTEXT,
    IM_END,
    AddedToken,
    TokenizerParts,
    compile_document,
    qwen2_document,
)

_SMALLEST = 256 + len(CONTROL_TOKENS)


def train_bbpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer with exactly ``vocab_size`` ids; the control tokens are the last three.

    The same texts always give the same tokenizer. Its chat template is Qwen2's.

    Args:
        texts: documents, streamed once.
        vocab_size: 256 bytes + merges + 3 control tokens.

    Raises:
        TokenizerError: ``vocab_size`` is below 259, or more than the texts can fill.
    """
    import tokenizers

    if vocab_size < _SMALLEST:
        raise TokenizerError(f"vocab_size must be at least {_SMALLEST}, got {vocab_size}")
    alphabet = sorted(BYTE_TO_CHAR.values())
    blank = {char: index for index, char in enumerate(alphabet)}
    encoder = compile_document(qwen2_document(blank, [], []), "byte alphabet")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=[],
    )
    encoder.train_from_iterator(texts, trainer=trainer)
    model = json.loads(encoder.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    if len(vocab) + len(CONTROL_TOKENS) < vocab_size:
        raise TokenizerError(
            f"the texts give only {len(vocab) + len(CONTROL_TOKENS)} tokens; "
            f"lower vocab_size (now {vocab_size}) or train on more text"
        )
    added = [AddedToken(len(vocab) + i, token) for i, token in enumerate(CONTROL_TOKENS)]
    merges = [(left, right) for left, right in model["merges"]]
    return Tokenizer(
        TokenizerParts(
            document=qwen2_document(vocab, merges, added),
            origin="trained tokenizer",
            eos_token=IM_END,
            pad_token=ENDOFTEXT,
        )
    )
