"""Recipe data -> tokenised `Corpus`: documents ended by <|endoftext|>, or masked conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwen2kit.config.data_tree import EmbeddedData, FileData, TextData, TextFormat
from qwen2kit.data.corpus import Corpus, collect
from qwen2kit.data.embedded import conversation, generate
from qwen2kit.data.formats import Message, to_messages, to_text
from qwen2kit.data.rows import Row, read_rows
from qwen2kit.errors import DataError, Qwen2KitError
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.supervision import encode_supervised

Example = tuple[list[int], list[bool]]

# What the default template adds to a conversation; it is worth tokens of its own.
_WORDS_OF_THE_TEMPLATE = ("system\n", "You are a helpful assistant.", "user\n", "assistant\n")


@dataclass(slots=True)
class EncodeReport:
    """What happened to the rows.

    Attributes:
        truncated: conversations cut to ``seq_len``.
        dropped: conversations whose cut left nothing to learn.
        empty: documents without text.
        rows: examples read.
    """

    truncated: int = 0
    dropped: int = 0
    empty: int = 0
    rows: int = 0

    def notes(self) -> list[str]:
        """One line per count that a user should know of."""
        counts = (
            (self.truncated, "conversations longer than seq_len were truncated"),
            (self.dropped, "conversations were dropped: nothing to learn within seq_len"),
            (self.empty, "empty documents were skipped"),
        )
        return [f"{count} of {self.rows} {text}" for count, text in counts if count]


def encode_corpus(
    data: EmbeddedData | FileData,
    tokenizer: Tokenizer,
    *,
    task: str,
    seq_len: int,
    too_long: str = "refuse",
    held_out: bool = False,
) -> tuple[Corpus, EncodeReport]:
    """Tokenise all of ``data``.

    Args:
        held_out: take the held-out split (embedded data only).

    Raises:
        DataError: a row is malformed, a conversation is longer than ``seq_len`` and ``too_long``
            is ``refuse``, or nothing is left to train on.
    """
    report = EncodeReport()
    if task == "sft":
        examples = _fit(_conversations(data, tokenizer, held_out), seq_len, too_long, report)
    else:
        examples = _documents(data, tokenizer, held_out, report)
    corpus = collect(examples)
    if len(corpus) == 0:
        raise DataError("the data holds no example to train on; check data.paths and data.format")
    return corpus, report


def read_messages(
    data: EmbeddedData | FileData, held_out: bool
) -> Iterator[tuple[Row, list[Message]]]:
    """The conversations of ``data`` with the rows they come from."""
    if isinstance(data, EmbeddedData):
        count = data.held_out if held_out else data.questions
        for number, question in enumerate(generate(data.seed, count, held_out), 1):
            yield Row("embedded corpus", number, {}), conversation(question)
        return
    assert not isinstance(data, TextData)
    for row in read_rows(data):
        yield row, to_messages(row, data.format, data.system)


def read_texts(data: EmbeddedData | FileData) -> Iterator[str]:
    """All text of ``data``, for training a tokenizer on."""
    if isinstance(data, TextData) or (
        not isinstance(data, EmbeddedData) and isinstance(data.format, TextFormat)
    ):
        format = TextFormat() if isinstance(data, TextData) else data.format
        assert isinstance(format, TextFormat)
        for row in read_rows(data):
            yield to_text(row, format)
        return
    for _, messages in read_messages(data, held_out=False):
        yield from _WORDS_OF_THE_TEMPLATE
        for message in messages:
            yield message["content"]


def _conversations(
    data: EmbeddedData | FileData, tokenizer: Tokenizer, held_out: bool
) -> Iterator[tuple[Row, list[int], list[bool]]]:
    for row, messages in read_messages(data, held_out):
        try:
            example = encode_supervised(tokenizer, messages)
        except Qwen2KitError as error:
            raise row.error(str(error)) from None
        yield row, example.tokens, example.supervised


def _fit(
    examples: Iterator[tuple[Row, list[int], list[bool]]],
    seq_len: int,
    too_long: str,
    report: EncodeReport,
) -> Iterator[Example]:
    # seq_len + 1 tokens make seq_len pairs of input and label.
    limit = seq_len + 1
    for row, tokens, supervised in examples:
        report.rows += 1
        if len(tokens) > limit:
            if too_long == "refuse":
                raise row.error(
                    f"{len(tokens)} tokens do not fit seq_len={seq_len}; raise seq_len or set "
                    "too_long=truncate"
                )
            report.truncated += 1
            tokens, supervised = tokens[:limit], supervised[:limit]
        if not any(supervised):
            report.dropped += 1
            continue
        yield tokens, supervised


def _documents(
    data: EmbeddedData | FileData, tokenizer: Tokenizer, held_out: bool, report: EncodeReport
) -> Iterator[Example]:
    for tokens in _document_tokens(data, tokenizer, held_out):
        report.rows += 1
        if not tokens:
            report.empty += 1
            continue
        ended = [*tokens, tokenizer.eot_id]
        yield ended, [True] * len(ended)


def _document_tokens(
    data: EmbeddedData | FileData, tokenizer: Tokenizer, held_out: bool
) -> Iterator[list[int]]:
    if isinstance(data, TextData):
        for row in read_rows(data):
            yield tokenizer.encode(row.value["text"], allow_special=False)
    elif not isinstance(data, EmbeddedData) and isinstance(data.format, TextFormat):
        for row in read_rows(data):
            yield tokenizer.encode(to_text(row, data.format), allow_special=False)
    else:
        for _, tokens, _ in _conversations(data, tokenizer, held_out):
            yield tokens
