"""Recipe nodes that say where examples come from and how a row is read."""

from __future__ import annotations

from dataclasses import field
from math import isfinite
from typing import Annotated, Literal

from qwen2kit.config.node import ByKind, check, node


@node
class TextFormat:
    """A row is one document in ``column``."""

    kind: Literal["text"] = "text"
    column: str = "text"


@node
class MessagesFormat:
    """A row holds a list of ``{"role", "content"}`` messages in ``column``."""

    kind: Literal["messages"] = "messages"
    column: str = "messages"


@node
class AlpacaFormat:
    """A row is an instruction, an optional input below it, and the answer."""

    kind: Literal["alpaca"] = "alpaca"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


@node
class PromptResponseFormat:
    """A row is one prompt and one response."""

    kind: Literal["prompt_response"] = "prompt_response"
    prompt: str = "prompt"
    response: str = "response"


@node
class ShareGPTFormat:
    """A row holds a list of ``{"from", "value"}`` turns in ``column``."""

    kind: Literal["sharegpt"] = "sharegpt"
    column: str = "conversations"


RowFormat = Annotated[
    TextFormat | MessagesFormat | AlpacaFormat | PromptResponseFormat | ShareGPTFormat, ByKind()
]


@node
class EmbeddedData:
    """The question corpus that `qwen2kit.data.embedded` generates.

    Attributes:
        seed: of the generator.
        questions: size of the training split.
        held_out: size of the held-out split, which is disjoint from it.
    """

    kind: Literal["embedded"] = "embedded"
    seed: int = 0
    questions: int = 20_000
    held_out: int = 300

    def __post_init__(self) -> None:
        check(
            (self.seed >= 0, f"seed must not be negative, got {self.seed}"),
            (self.questions >= 1, f"questions must be at least 1, got {self.questions}"),
            (self.held_out >= 1, f"held_out must be at least 1, got {self.held_out}"),
        )


def _check_files(paths: tuple[str, ...], shuffle_rows: int) -> None:
    check(
        (bool(paths), "paths must name at least one file or pattern"),
        (shuffle_rows >= 1, f"shuffle_rows must be at least 1, got {shuffle_rows}"),
    )


@node
class TextData:
    """Plain UTF-8 text files, for pre-training; ``.gz`` and ``.zst`` are decompressed.

    Attributes:
        paths: files or glob patterns.
        split: what one document is: a whole ``file``, a ``line``, or a ``paragraph`` (text
            between blank lines).
        stream: false tokenises everything before training and keeps it in memory (5 bytes per
            token), shuffled as a whole. True (pre-training only) tokenises while training: for
            more text than memory holds. Files come in a shuffled order, rows are shuffled within
            blocks. Every process tokenises everything: above some processes, use shards.
        shuffle_rows: rows per block of a stream.
    """

    kind: Literal["text"] = "text"
    paths: tuple[str, ...]
    split: Literal["file", "line", "paragraph"] = "file"
    stream: bool = False
    shuffle_rows: int = 1024

    def __post_init__(self) -> None:
        _check_files(self.paths, self.shuffle_rows)


@node
class JsonlData:
    """JSON rows: ``.jsonl`` files, or ``.json`` files that hold one array; also compressed.

    Attributes:
        paths: files or glob patterns.
        format: how a row is read.
        system: system message for conversations that have none; None leaves the choice to the
            chat template.
        stream, shuffle_rows: as in `TextData`.
    """

    kind: Literal["jsonl"] = "jsonl"
    paths: tuple[str, ...]
    format: RowFormat = field(default_factory=TextFormat)
    system: str | None = None
    stream: bool = False
    shuffle_rows: int = 1024

    def __post_init__(self) -> None:
        _check_files(self.paths, self.shuffle_rows)


@node
class ParquetData:
    """Parquet files, read row group by row group (needs pyarrow); fields as in `JsonlData`."""

    kind: Literal["parquet"] = "parquet"
    paths: tuple[str, ...]
    format: RowFormat = field(default_factory=TextFormat)
    system: str | None = None
    stream: bool = False
    shuffle_rows: int = 1024

    def __post_init__(self) -> None:
        _check_files(self.paths, self.shuffle_rows)


@node
class ShardData:
    """Tokens that ``qwen2kit data tokenize`` has written: for any amount of data.

    Documents are concatenated and cut into rows, which every epoch visits in a new order over
    all shards. Conversations stay whole.

    Attributes:
        paths: directories of shards, or glob patterns.
    """

    kind: Literal["shards"] = "shards"
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        check((bool(self.paths), "paths must name at least one directory or pattern"))


SourceData = Annotated[EmbeddedData | TextData | JsonlData | ParquetData | ShardData, ByKind()]


@node
class MixtureSource:
    """One source of a mixture.

    Attributes:
        weight: its share of the rows, relative to the other weights.
        data: its rows.
    """

    weight: float
    data: SourceData

    def __post_init__(self) -> None:
        check(
            (
                isfinite(self.weight) and self.weight > 0,
                f"weight must be positive, got {self.weight}",
            )
        )


@node
class MixtureData:
    """Rows of several sources in fixed proportions; an exhausted source starts its next epoch.

    Needs ``train.steps``: sources of different sizes have no common epoch.
    """

    kind: Literal["mixture"] = "mixture"
    sources: tuple[MixtureSource, ...]

    def __post_init__(self) -> None:
        check(
            (bool(self.sources), "sources must hold at least one source"),
            (
                isfinite(sum(source.weight for source in self.sources)),
                "the weights add up to more than a number can hold; lower them",
            ),
        )


DataConfig = Annotated[
    EmbeddedData | TextData | JsonlData | ParquetData | ShardData | MixtureData, ByKind()
]
FileData = TextData | JsonlData | ParquetData
AnyData = EmbeddedData | FileData | ShardData | MixtureData


def is_chat(data: AnyData) -> bool:
    """Whether the rows can be conversations (else they are plain documents)."""
    if isinstance(data, MixtureData):
        return all(is_chat(source.data) for source in data.sources)
    if isinstance(data, EmbeddedData | ShardData):
        return True
    return not isinstance(data, TextData) and not isinstance(data.format, TextFormat)


def is_countable(data: AnyData) -> bool:
    """Whether an epoch of the data has a known number of rows."""
    return not isinstance(data, MixtureData) and not _is_stream(data)


def streams(data: AnyData) -> bool:
    """Whether any of the data is tokenised while training."""
    if isinstance(data, MixtureData):
        return any(_is_stream(source.data) for source in data.sources)
    return _is_stream(data)


def _is_stream(data: EmbeddedData | FileData | ShardData) -> bool:
    return isinstance(data, FileData) and data.stream


def check_data(
    data: AnyData, *, task: str, epochs: int | None, held_out: AnyData | None, fraction: float
) -> tuple[tuple[bool, str], ...]:
    """The rules that data, task and evaluation of a recipe obey together, for `check`."""
    chat = task == "sft"
    both = [data] if held_out is None else [data, held_out]
    return (
        (
            all(is_chat(part) for part in both) or not chat,
            "task sft needs conversations: choose a data.format other than text",
        ),
        (
            not (chat and streams(data)),
            "data.stream is for task pretrain (conversations are packed whole): remove it",
        ),
        (
            epochs is None or is_countable(data),
            "streamed or mixed data has no countable epoch: set train.steps, not train.epochs",
        ),
        (
            fraction == 0 or is_countable(data),
            "streamed or mixed data cannot be split: set eval.data, not eval.fraction",
        ),
        (
            held_out is None or is_countable(held_out),
            "eval.data must be read as a whole: no mixture, no stream",
        ),
    )
