"""The first examples of any data, with the tokens that carry loss: for people to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any

from qwen2kit.config.data_tree import (
    AnyData,
    EmbeddedData,
    FileData,
    MixtureData,
    ShardData,
    is_chat,
)
from qwen2kit.data.encode import (
    as_documents,
    encode_conversations,
    encode_documents,
    read_messages,
)
from qwen2kit.data.rows import read_rows
from qwen2kit.data.shard_format import Task
from qwen2kit.data.shards import ShardSet, find_directories
from qwen2kit.tokenizer.bpe import Tokenizer


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One document or conversation.

    Attributes:
        place: where it is from.
        tokens: all of them.
        supervised: per token, whether it carries loss.
    """

    place: str
    tokens: list[int]
    supervised: list[bool]

    def runs(self, max_tokens: int) -> Iterator[tuple[list[int], bool]]:
        """Neighbouring tokens with equal supervision, within the first ``max_tokens``."""
        pairs = zip(self.tokens[:max_tokens], self.supervised, strict=False)
        for supervised, run in groupby(pairs, key=lambda pair: pair[1]):
            yield [token for token, _ in run], supervised

    def to_json(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Place, text, ids and mask."""
        return {
            "place": self.place,
            "text": tokenizer.decode(self.tokens),
            "tokens": self.tokens,
            "supervised": self.supervised,
        }


def first_examples(
    data: AnyData, tokenizer: Tokenizer, task: Task, count: int
) -> Iterator[ShownExample]:
    """The first ``count`` examples of every source, read no further than needed.

    Raises:
        DataError: as training on the data would.
    """
    if isinstance(data, MixtureData):
        for source in data.sources:
            yield from first_examples(source.data, tokenizer, task, count)
    elif isinstance(data, ShardData):
        shards = ShardSet(find_directories(data.paths), task, tokenizer)
        yield from islice(_of_shards(shards), count)
    else:
        yield from islice(_of_rows(data, tokenizer, task), count)


def _of_rows(
    data: EmbeddedData | FileData, tokenizer: Tokenizer, task: Task
) -> Iterator[ShownExample]:
    if is_chat(data):
        conversations = encode_conversations(read_messages(data), tokenizer)
        if task == "sft":
            for row, tokens, supervised in conversations:
                yield ShownExample(row.place, tokens, supervised)
            return
        batches = as_documents(conversations, tokenizer)
    else:
        assert not isinstance(data, EmbeddedData)
        batches = encode_documents(data, read_rows(data), tokenizer)
    for row, tokens in chain.from_iterable(batches):
        if tokens:
            yield ShownExample(row.place, tokens, [True] * len(tokens))


def _of_shards(shards: ShardSet) -> Iterator[ShownExample]:
    for number in range(len(shards)):
        shard = shards[number]
        for document in range(len(shard.offsets) - 1):
            start, stop = (int(end) for end in shard.offsets[document : document + 2])
            tokens, supervised = shard.span(start, stop)
            mask = [True] * len(tokens) if supervised is None else supervised.tolist()
            place = f"{shards.describe(number)}, document {document}"
            yield ShownExample(place, tokens.tolist(), mask)
