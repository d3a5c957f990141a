"""Recipe nodes that say where examples come from and how a row is read."""

from __future__ import annotations

from dataclasses import field
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


@node
class TextData:
    """Plain UTF-8 text files, for pre-training.

    Attributes:
        paths: files or glob patterns.
        split: what one document is: a whole ``file``, a ``line``, or a ``paragraph`` (text
            between blank lines).
    """

    kind: Literal["text"] = "text"
    paths: tuple[str, ...]
    split: Literal["file", "line", "paragraph"] = "file"

    def __post_init__(self) -> None:
        check((bool(self.paths), "paths must name at least one file or pattern"))


@node
class JsonlData:
    """JSON rows: ``.jsonl`` files, or ``.json`` files that hold one array.

    Attributes:
        paths: files or glob patterns.
        format: how a row is read.
        system: system message for conversations that have none; None leaves the choice to the
            chat template.
    """

    kind: Literal["jsonl"] = "jsonl"
    paths: tuple[str, ...]
    format: RowFormat = field(default_factory=TextFormat)
    system: str | None = None

    def __post_init__(self) -> None:
        check((bool(self.paths), "paths must name at least one file or pattern"))


@node
class ParquetData:
    """Parquet files, read row group by row group (needs pyarrow); fields as in `JsonlData`."""

    kind: Literal["parquet"] = "parquet"
    paths: tuple[str, ...]
    format: RowFormat = field(default_factory=TextFormat)
    system: str | None = None

    def __post_init__(self) -> None:
        check((bool(self.paths), "paths must name at least one file or pattern"))


DataConfig = Annotated[EmbeddedData | TextData | JsonlData | ParquetData, ByKind()]
FileData = TextData | JsonlData | ParquetData


def is_chat(data: EmbeddedData | FileData) -> bool:
    """Whether the rows are conversations (else they are plain documents)."""
    if isinstance(data, EmbeddedData):
        return True
    return not isinstance(data, TextData) and not isinstance(data.format, TextFormat)
