"""The log that makes an evaluation resumable: every answer is on disk as soon as it is known.

``requests.jsonl`` holds one line per answered request: ``{"key": ..., "answer": ...}``. The key is
a hash of the model's digest and of what was asked, so an answer is found again whatever the order
of the requests, and never serves another model or prompt. Of several processes, each writes a file
of its own (``requests-1.jsonl``, ...).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

from qwen2kit.backend.values import ScoreRequest
from qwen2kit.errors import ConfigError, DataError

FILE = "requests.jsonl"
_encode = json.JSONEncoder(ensure_ascii=False).encode


class RequestLog:
    """Answers by key; on disk too if a path is given.

    A last line without an end, left by a process that was killed, is cut off. Answers that other
    processes of an earlier run have logged beside ``path`` are known too. Use as a context manager
    to close the file.

    Args:
        path: the file, made if absent; None keeps nothing.
        model: digest of model and settings that change its answers.

    Raises:
        DataError: a line of the file is damaged.
        ConfigError: another process is writing the file.
    """

    def __init__(self, path: Path | None = None, model: str = "") -> None:
        self._model = model
        self._answers: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        self.reused = 0
        self.computed = 0
        if path is not None:
            self._file = _open_alone(path)
            for other in path.parent.glob(worker_log(path.parent, "*").name):
                if other != path:
                    self._answers.update(read_new(other, 0)[0])
            self._answers.update(_read(self._file, path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def score_keys(self, requests: Iterable[ScoreRequest]) -> list[str]:
        """Keys of requests to score; equal requests get keys of their own."""
        return self._distinct(self._score_hashes(requests))

    def text_keys(self, requests: Iterable[Sequence[Any]], settings: Any) -> list[str]:
        """Keys of ``(prompt, generation arguments)``; repeats of one prompt are told apart."""
        return self._distinct(
            self._text_hash(json.dumps([*r, settings], sort_keys=True, default=str))
            for r in requests
        )

    def look_up(self, keys: Sequence[str]) -> tuple[list[Any], list[int]]:
        """The answer to every key, None where it is not known; and the places of those."""
        answers = [self._answers.get(key) for key in keys]
        unknown = [place for place, answer in enumerate(answers) if answer is None]
        self.reused += len(keys) - len(unknown)
        return answers, unknown

    def add(self, key: str, answer: Any) -> None:
        """Record an answer (JSON values); it survives the death of this process."""
        self.computed += 1
        if self._file is None:
            return
        self._answers[key] = answer
        line = _encode({"key": key, "answer": answer})
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def _score_hashes(self, requests: Iterable[ScoreRequest]) -> Iterator[str]:
        context: tuple[int, ...] | None = None
        begun = hashlib.sha256()
        for request in requests:
            if request.context is not context:  # requests may share one
                context = request.context
                head = array("q", [len(context), *context]).tobytes()
                begun = hashlib.sha256(f"{self._model} score ".encode() + head)
            digest = begun.copy()
            digest.update(array("q", request.continuation).tobytes())
            yield digest.hexdigest()[:32]

    def _text_hash(self, content: str) -> str:
        return hashlib.sha256(f"{self._model} generate {content}".encode()).hexdigest()[:32]

    @staticmethod
    def _distinct(hashes: Iterable[str]) -> list[str]:
        seen: Counter[str] = Counter()
        keys = []
        for key in hashes:
            keys.append(f"{key}-{seen[key]}" if seen[key] else key)
            seen[key] += 1
        return keys


def worker_log(directory: Path, rank: int | str) -> Path:
    """The file of process ``rank``, from 1."""
    return directory / f"{Path(FILE).stem}-{rank}.jsonl"


def read_new(path: Path, start: int) -> tuple[list[tuple[str, Any]], int]:
    """(key, answer) of the whole lines from byte ``start`` on, and where the next one begins.

    Raises:
        DataError: a line of the file is damaged.
    """
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return list(_entries(whole, path)), start + len(whole)


def _open_alone(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"another evaluation is writing {path}; wait for it to end") from error
    return file


def _read(file: IO[bytes], path: Path) -> dict[str, Any]:
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    file.seek(0, os.SEEK_END)
    return dict(_entries(content[:whole], path))


def _entries(lines: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            entry = json.loads(line)
            yield entry["key"], entry["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is damaged; remove that line") from error
