"""Text and conversations -> tokens and masks, with a small trained tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.config.data_tree import (
    AlpacaFormat,
    EmbeddedData,
    JsonlData,
    MessagesFormat,
    PromptResponseFormat,
    TextData,
)
from qwen2kit.data.encode import encode_corpus, read_texts
from qwen2kit.errors import DataError
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.train_bbpe import train_bbpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bbpe(["the cat sat on the mat", "what is the answer?"] * 5, 280)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_documents_end_with_endoftext_and_all_is_supervised(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("the cat<|im_end|>\n\nthe mat", encoding="utf-8")
    corpus, report = encode_corpus(
        TextData(paths=(str(path),), split="line"), tokenizer, task="pretrain", seq_len=8
    )
    assert len(corpus) == 2
    assert corpus.supervised.all()
    first = corpus.tokens[: corpus.offsets[1]].tolist()
    assert first[-1] == tokenizer.eot_id
    assert tokenizer.im_end_id not in first, "text must not smuggle control tokens in"
    assert tokenizer.decode(first[:-1]) == "the cat<|im_end|>"
    assert report.notes() == ["1 of 3 empty documents were skipped"]


def test_conversations_supervise_the_answer_and_its_end(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "what is the cat?", "response": "the mat"}])
    data = JsonlData(paths=(path,), format=PromptResponseFormat())
    corpus, _ = encode_corpus(data, tokenizer, task="sft", seq_len=64)
    chosen = corpus.tokens[corpus.supervised].tolist()
    assert chosen == [*tokenizer.encode("the mat"), tokenizer.im_end_id]
    whole = tokenizer.decode(corpus.tokens.tolist())
    assert whole == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nwhat is the cat?<|im_end|>\n"
        "<|im_start|>assistant\nthe mat<|im_end|>\n"
    )


def test_conversations_can_be_pretrained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "the", "input": "", "output": "mat"}])
    data = JsonlData(paths=(path,), format=AlpacaFormat())
    corpus, _ = encode_corpus(data, tokenizer, task="pretrain", seq_len=8)
    assert corpus.supervised.all()
    assert corpus.tokens[-1] == tokenizer.eot_id


def test_too_long_conversations_are_refused_or_counted(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "the", "response": "cat"},
        {"prompt": "the", "response": "mat " * 60},
        {"prompt": "the " * 200, "response": "cat"},
    ]
    data = JsonlData(paths=(write(tmp_path / "a.jsonl", rows),), format=PromptResponseFormat())
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: \d+ tokens do not fit seq_len=80"):
        encode_corpus(data, tokenizer, task="sft", seq_len=80)
    corpus, report = encode_corpus(data, tokenizer, task="sft", seq_len=80, too_long="truncate")
    assert len(corpus) == 2
    assert corpus.lengths.max() == 81
    assert (report.truncated, report.dropped, report.rows) == (2, 1, 3)
    assert len(report.notes()) == 2
    write(tmp_path / "a.jsonl", rows[2:])
    with pytest.raises(DataError, match="all 1 conversations were cut at seq_len=80 before"):
        encode_corpus(data, tokenizer, task="sft", seq_len=80, too_long="truncate")


def test_errors_name_the_row_and_empty_data_is_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bad = [{"role": "assistant", "content": "first"}, {"role": "user", "content": "x"}]
    data = JsonlData(
        paths=(write(tmp_path / "a.jsonl", [{"messages": bad}]),), format=MessagesFormat()
    )
    with pytest.raises(DataError, match=r"a\.jsonl, row 1: .*starts with the assistant"):
        encode_corpus(data, tokenizer, task="sft", seq_len=64)
    empty = TextData(paths=(write(tmp_path / "empty.txt", []),))
    with pytest.raises(DataError, match="no example to train on"):
        encode_corpus(empty, tokenizer, task="pretrain", seq_len=64)


def test_embedded_splits_are_disjoint_and_texts_train_a_tokenizer() -> None:
    texts = list(read_texts(EmbeddedData(questions=400)))
    tokenizer = train_bbpe(texts, 320)
    train, _ = encode_corpus(EmbeddedData(questions=300), tokenizer, task="sft", seq_len=128)
    held, _ = encode_corpus(
        EmbeddedData(held_out=100), tokenizer, task="sft", seq_len=128, held_out=True
    )

    def documents(corpus: Any) -> set[tuple[int, ...]]:
        cuts = zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
        return {tuple(corpus.tokens[a:b].tolist()) for a, b in cuts}

    assert not documents(train) & documents(held)
    assert len(documents(held)) == 100


def test_a_text_that_is_no_unicode_is_named_before_a_tokenizer_is_trained(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: text is not valid Unicode"):
        train_bbpe(read_texts(JsonlData(paths=(str(tmp_path / "a.jsonl"),))), 320)
