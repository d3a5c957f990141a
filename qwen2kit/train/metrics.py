"""Where the numbers of a run go: ``metrics.jsonl`` always, a screen if there is one.

A record is a flat JSON object with ``event`` (``step``, ``eval`` or ``rewind``) and ``step``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from qwen2kit.errors import TrainingError
from qwen2kit.partial_file import reason_of, write_text_atomically

Record = dict[str, Any]


class Sink(Protocol):
    """Takes records as they happen."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...


class JsonlSink:
    """Appends records to a file, line by line.

    Args:
        path: created by the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep_upto(self, step: int, *, evaluated: bool = True) -> None:
        """Drop records beyond ``step``: what came after a checkpoint will happen again.

        Args:
            evaluated: false drops the evaluation of ``step`` as well.
        """
        kept = [r for r in read_records(self.path) if r["step"] <= step]
        if not evaluated:
            kept = [r for r in kept if (r["event"], r["step"]) != ("eval", step)]
        write_text_atomically(self.path, "".join(_line(record) for record in kept))

    def write(self, record: Record) -> None:
        """Append one line; NaN and infinity become null. A rewind drops what will be done anew.

        Raises:
            TrainingError: the disk is full or not writable.
        """
        try:
            if record["event"] == "rewind":
                self.keep_upto(record["step"] - 1)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.path} at step {record['step']}: {reason_of(error)}"
            ) from error


class Sinks:
    """Several sinks as one; more may join later."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = list(sinks)

    def add(self, sink: Sink) -> None:
        """Let ``sink`` have every record from now on."""
        self._sinks.append(sink)

    def write(self, record: Record) -> None:
        """Hand ``record`` to every sink."""
        for sink in self._sinks:
            sink.write(record)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a ``metrics.jsonl``, none if it is absent.

    A last line cut off by a crash is left out.

    Raises:
        TrainingError: another line is damaged.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            yield record
        elif number < len(lines):
            raise TrainingError(f"{path}, line {number} is damaged; remove that line")


def _record(line: str) -> Record | None:
    """What a line holds, if that is a record."""
    try:
        record = json.loads(line)
        sound = isinstance(record["step"], int) and isinstance(record["event"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if sound else None


def _line(record: Record) -> str:
    finite = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"
