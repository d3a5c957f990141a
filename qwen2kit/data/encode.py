"""Rows -> tokens: documents ended by <|endoftext|>, or conversations with a loss mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwen2kit.config.data_tree import (
    AnyData,
    EmbeddedData,
    FileData,
    MixtureData,
    ShardData,
    TextData,
    TextFormat,
    is_chat,
)
from qwen2kit.data.corpus import Corpus, collect
from qwen2kit.data.embedded import conversation, generate
from qwen2kit.data.formats import Message, to_messages, to_text
from qwen2kit.data.rows import Row, read_rows
from qwen2kit.errors import ConfigError, DataError, Qwen2KitError, TokenizerError
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.supervision import encode_supervised

Example = tuple[list[int], list[bool]]
Document = tuple[Row, list[int]]
"""A row and its tokens, ``<|endoftext|>`` included; no tokens at all if the row has no text."""
Conversation = tuple[Row, list[int], list[bool]]
"""A row, its tokens, and which of them are to be predicted."""

# What the default template adds to a conversation; it is worth tokens of its own.
_WORDS_OF_THE_TEMPLATE = ("system\n", "You are a helpful assistant.", "user\n", "assistant\n")
# Texts encoded by one call: enough to keep its overhead small, little to hold in memory.
_BATCH_TEXTS, _BATCH_CHARACTERS = 512, 1 << 18


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
        conversations = encode_conversations(read_messages(data, held_out), tokenizer)
        examples = _fit(conversations, seq_len, too_long, report)
    elif is_chat(data):
        conversations = encode_conversations(read_messages(data, held_out), tokenizer)
        examples = _counted(as_documents(conversations, tokenizer), report)
    else:
        assert not isinstance(data, EmbeddedData)
        examples = _counted(encode_documents(data, read_rows(data), tokenizer), report)
    corpus = collect(examples)
    if len(corpus) == 0 and report.dropped:
        raise DataError(
            f"all {report.rows} conversations were cut at seq_len={seq_len} before there is "
            "anything to learn; raise seq_len"
        )
    if len(corpus) == 0:
        where = "" if isinstance(data, EmbeddedData) else f" ({', '.join(data.paths)})"
        raise DataError(f"the data holds no example to train on{where}; check its paths and format")
    return corpus, report


def read_messages(
    data: EmbeddedData | FileData, held_out: bool = False
) -> Iterator[tuple[Row, list[Message]]]:
    """The conversations of ``data`` with the rows they come from."""
    if not isinstance(data, EmbeddedData):
        yield from messages_of(data, read_rows(data))
        return
    count = data.held_out if held_out else data.questions
    for number, question in enumerate(generate(data.seed, count, held_out), 1):
        yield Row("embedded corpus", number, {}), conversation(question)


def messages_of(data: FileData, rows: Iterable[Row]) -> Iterator[tuple[Row, list[Message]]]:
    """The conversation in every row."""
    assert not isinstance(data, TextData)
    for row in rows:
        yield row, to_messages(row, data.format, data.system)


def read_texts(data: AnyData) -> Iterator[str]:
    """All text of ``data``, for training a tokenizer on.

    Raises:
        ConfigError: shards, which hold no text.
        DataError: a row cannot be read, or its text is not valid Unicode.
    """
    if isinstance(data, MixtureData):
        for source in data.sources:
            yield from read_texts(source.data)
        return
    if isinstance(data, ShardData):
        raise ConfigError(
            "a tokenizer cannot be trained on shards: set model.tokenizer to the tokenizer "
            "directory inside them"
        )
    if not isinstance(data, EmbeddedData) and not is_chat(data):
        yield from (_valid(row, text) for row, text in _texts(data, read_rows(data)))
        return
    for row, messages in read_messages(data):
        yield from _WORDS_OF_THE_TEMPLATE
        for message in messages:
            yield _valid(row, message["content"])


def _valid(row: Row, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise row.error(
            "text is not valid Unicode (it holds lone surrogates); decode it as UTF-8 first"
        ) from None
    return text


def encode_conversations(
    conversations: Iterable[tuple[Row, list[Message]]], tokenizer: Tokenizer
) -> Iterator[Conversation]:
    """Tokens and mask of every conversation.

    Raises:
        DataError: naming the row that cannot be encoded.
    """
    for row, messages in conversations:
        try:
            example = encode_supervised(tokenizer, messages)
        except Qwen2KitError as error:
            raise row.error(str(error)) from None
        yield row, example.tokens, example.supervised


def encode_documents(
    data: FileData, rows: Iterable[Row], tokenizer: Tokenizer
) -> Iterator[list[Document]]:
    """The documents in ``rows``, in batches; conversations are documents to pre-train on, too.

    Raises:
        DataError: naming the row that cannot be read or encoded.
    """
    if is_chat(data):
        yield from as_documents(encode_conversations(messages_of(data, rows), tokenizer), tokenizer)
        return
    for batch in _batches(_texts(data, rows)):
        found = _encode(batch, tokenizer)
        yield [
            (row, [*tokens, tokenizer.eot_id] if tokens else [])
            for (row, _), tokens in zip(batch, found, strict=True)
        ]


def as_documents(
    conversations: Iterable[Conversation], tokenizer: Tokenizer
) -> Iterator[list[Document]]:
    """Every conversation as a batch of one document."""
    for row, tokens, _ in conversations:
        yield [(row, [*tokens, tokenizer.eot_id])]


def _texts(data: FileData, rows: Iterable[Row]) -> Iterator[tuple[Row, str]]:
    format = TextFormat() if isinstance(data, TextData) else data.format
    assert isinstance(format, TextFormat)
    for row in rows:
        yield row, to_text(row, format)


def _batches(texts: Iterable[tuple[Row, str]]) -> Iterator[list[tuple[Row, str]]]:
    batch: list[tuple[Row, str]] = []
    characters = 0
    for row, text in texts:
        batch.append((row, text))
        characters += len(text)
        if len(batch) == _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[tuple[Row, str]], tokenizer: Tokenizer) -> list[list[int]]:
    try:
        return tokenizer.encode_many([text for _, text in batch], allow_special=False)
    except TokenizerError:
        for row, text in batch:  # which one was it?
            try:
                tokenizer.encode(text, allow_special=False)
            except TokenizerError as error:
                raise row.error(str(error)) from None
        raise


def _counted(batches: Iterable[list[Document]], report: EncodeReport) -> Iterator[Example]:
    for batch in batches:
        for _, tokens in batch:
            report.rows += 1
            if tokens:
                yield tokens, [True] * len(tokens)
            else:
                report.empty += 1


def _fit(
    conversations: Iterable[Conversation], seq_len: int, too_long: str, report: EncodeReport
) -> Iterator[Example]:
    # seq_len + 1 tokens make seq_len pairs of input and label.
    limit = seq_len + 1
    for row, tokens, supervised in conversations:
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
