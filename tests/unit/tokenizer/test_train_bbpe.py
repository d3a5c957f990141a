"""Training: size, order of ids, determinism, and the pre-tokenization that merges respect."""

from __future__ import annotations

import json

import pytest
import tokenizers

from qwen2kit.errors import TokenizerError
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.train_bbpe import train_bbpe

TEXTS = ["low lower lowest newer wider " * 20, "12 34 café 好好 " * 10]


def test_control_tokens_are_the_last_ids() -> None:
    trained = train_bbpe(iter(TEXTS), 280)
    assert trained.vocab_size == 280
    assert sorted(trained.special_ids) == [277, 278, 279]
    assert trained.default_system == "You are a helpful assistant."


def test_training_is_deterministic(tmp_path_factory: pytest.TempPathFactory) -> None:
    written = []
    for name in ("a", "b"):
        path = tmp_path_factory.mktemp(name)
        train_bbpe(iter(TEXTS), 280).save(path)
        written.append((path / "tokenizer.json").read_bytes())
    assert written[0] == written[1]


def test_first_merge_is_the_most_frequent_pair(small: Tokenizer) -> None:
    trained = train_bbpe(["ab" * 50 + " cd"], 260)
    assert trained.token_bytes(256) == b"ab"
    assert small.token_bytes(0) == b"!"


def test_merges_never_cross_pre_tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("t")
    train_bbpe(["12 12 12 a\n\n a\n\n it's it's "] * 9, 264).save(path)
    document = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    spelled = set(document["model"]["vocab"])
    assert not any(sum(char.isdigit() for char in token) > 1 for token in spelled)
    ours = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    pieces = [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str("it'S 12\n\n x")]
    assert pieces == ["it", "'S", "Ġ", "1", "2", "ĊĊ", "Ġx"]


def test_vocabulary_size_out_of_reach() -> None:
    with pytest.raises(TokenizerError, match="at least 259, got 258"):
        train_bbpe(TEXTS, 258)
    with pytest.raises(TokenizerError, match="the texts give only"):
        train_bbpe(TEXTS, 5000)
