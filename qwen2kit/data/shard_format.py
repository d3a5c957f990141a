"""Token shards on disk: flat little-endian arrays that ``numpy.memmap`` reads, and a JSON index.

A directory holds, for every shard ``NAME`` (five digits):

- ``NAME.tokens``: uint16 or uint32 (``dtype`` in the index), all documents one after the other,
  each ended by ``<|endoftext|>`` (pre-training) or as the chat template ends it (conversations);
- ``NAME.offsets``: int64 ``[documents + 1]``, the first token of every document;
- ``NAME.supervised`` (conversations only): one bit per token, lowest bit first, whether the token
  is to be predicted (``numpy.unpackbits(..., bitorder="little")``);

beside ``index.json`` (counts, SHA-256 of every file, fingerprint of the tokenizer, what it was
made from) and ``tokenizer/``. The index is written last: without it the shards are unfinished.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from qwen2kit.errors import DataError
from qwen2kit.partial_file import write_text_atomically
from qwen2kit.tokenizer.bpe import Tokenizer

INDEX_FILE, JOB_FILE, TOKENIZER_DIR = "index.json", "job.json", "tokenizer"
FORMAT, VERSION = "qwen2kit token shards", 1
Task = Literal["pretrain", "sft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard of an index.

    Attributes:
        name: of its files, without suffix.
        documents, tokens: how many it holds.
        supervised: tokens to be predicted.
        empty: documents without text that were left out.
        sha256: digest of each file, by suffix.
    """

    name: str
    documents: int
    tokens: int
    supervised: int
    empty: int
    sha256: dict[str, str]

    def sizes(self, dtype: str) -> dict[str, int]:
        """Bytes of each file, by suffix."""
        width = {"uint16": 2, "uint32": 4}[dtype]
        sizes = {"tokens": width * self.tokens, "offsets": 8 * (self.documents + 1)}
        return sizes | {"supervised": -(-self.tokens // 8)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """What a directory of shards holds.

    Attributes:
        task: ``pretrain`` (documents, every token supervised) or ``sft`` (conversations).
        dtype: of the tokens, ``uint16`` or ``uint32``.
        tokenizer: `tokenizer_digest` of what made them.
        made_from: recipe node, input digest and sizes of the work that made them.
    """

    task: Task
    dtype: str
    tokenizer: str
    made_from: dict[str, Any]
    shards: tuple[ShardInfo, ...]

    def total(self, count: str) -> int:
        """Sum of a count (``documents``, ``tokens``, ``supervised``, ``empty``)."""
        return sum(getattr(shard, count) for shard in self.shards)

    def fingerprint(self) -> str:
        """SHA-256 of the shards' digests: cheap, and as telling as a hash of all tokens."""
        content = [self.task, self.dtype, self.tokenizer, [s.sha256 for s in self.shards]]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The content of ``index.json``."""
        counts = ("documents", "tokens", "supervised", "empty")
        totals = {count: self.total(count) for count in counts}
        head = {"format": FORMAT, "version": VERSION}
        values = asdict(self)
        shards = values.pop("shards")
        return {**head, **values, **totals, "shards": shards}


def token_dtype(vocab_size: int) -> str:
    """The narrowest dtype of tokens: ``uint16`` up to 65,536 ids, else ``uint32``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def tokenizer_digest(tokenizer: Tokenizer, task: Task) -> str:
    """What decides the ids: the tokenizer, and for conversations its chat template as well."""
    if task == "pretrain":
        return tokenizer.fingerprint
    text = f"{tokenizer.fingerprint} {tokenizer.chat_template}"
    return sha256(text.encode()).hexdigest()


def write_index(directory: Path, index: ShardIndex) -> None:
    """Write ``index.json`` atomically."""
    text = json.dumps(index.to_json(), indent=1, ensure_ascii=False)
    write_text_atomically(directory / INDEX_FILE, text + "\n")


def read_index(directory: Path) -> ShardIndex:
    """The index of a directory of shards.

    Raises:
        DataError: it is not such a directory, unfinished, damaged, or of another version.
    """
    path = directory / INDEX_FILE
    if not path.is_file():
        if (directory / JOB_FILE).is_file():
            raise DataError(
                f"{directory} is unfinished; run the same `qwen2kit data tokenize` again to go on"
            )
        raise DataError(f"{directory} holds no token shards (no {INDEX_FILE}); make them with "
                        "`qwen2kit data tokenize`")  # fmt: skip
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT or values["version"] != VERSION:
            raise DataError(
                f"{path} is {values['format']!r} version {values['version']}; this release reads "
                f"{FORMAT!r} version {VERSION}"
            )
        index = ShardIndex(
            task=values["task"],
            dtype=values["dtype"],
            tokenizer=values["tokenizer"],
            made_from=values["made_from"],
            shards=tuple(ShardInfo(**shard) for shard in values["shards"]),
        )
        _check_types(index)
        return index
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({type(error).__name__}); restore it") from None


def _check_types(index: ShardIndex) -> None:
    """Raise ValueError unless every field is what it is declared to be."""
    counts = [
        count
        for shard in index.shards
        for count in (shard.documents, shard.tokens, shard.supervised, shard.empty)
    ]
    sound = (
        index.task in ("pretrain", "sft"),
        index.dtype in ("uint16", "uint32"),
        isinstance(index.tokenizer, str),
        isinstance(index.made_from, dict),
        all(type(count) is int and count >= 0 for count in counts),
        all(isinstance(shard.name, str) for shard in index.shards),
        all(isinstance(shard.sha256, dict) for shard in index.shards),
    )
    if not all(sound):
        raise ValueError


def check_sizes(directory: Path, index: ShardIndex) -> None:
    """Raise DataError if a shard's file is missing or has not the size the index says."""
    for shard in index.shards:
        for suffix, size in shard.sizes(index.dtype).items():
            path = directory / f"{shard.name}.{suffix}"
            if suffix not in shard.sha256:
                continue
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise DataError(f"{path} {state}; restore it or tokenise again")
