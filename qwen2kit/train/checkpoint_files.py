"""The files of one checkpoint directory: written by many processes, each vouching for its own.

A process lists its files with their checksums in ``files-<rank>.json``; ``state.json``, written
last, says how many processes there were.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

from qwen2kit.backend.protocol import Saving
from qwen2kit.errors import TrainingError
from qwen2kit.partial_file import sync_directory

STATE_FILE = "state.json"
SCHEMA_VERSION = 2
_BLOCK = 1 << 22


class Receipt:
    """Waits in the background for the files of this process, makes them durable, lists them.

    Attributes:
        error: why it failed, once `done`.
    """

    def __init__(self, saving: Saving, directory: Path, rank: int) -> None:
        self._saving = saving
        self._directory = directory
        self._list = directory / _list_name(rank)
        self.error: Exception | None = None
        # A daemon: a run that fails does not wait for files nobody will use.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Block until then."""
        self._thread.join()

    def _run(self) -> None:
        try:
            names = self._saving.wait()
            checksums = {name: _durable(self._directory / name) for name in sorted(names)}
            _write_json(self._list, checksums)
        except Exception as error:
            self.error = error
        except BaseException as error:  # a framework's idea of an exception
            self.error = RuntimeError(repr(error))


def write_state(directory: Path, state: dict[str, Any], processes: int) -> None:
    """Complete the checkpoint of ``processes`` processes, all of which are done (OSError)."""
    document = {"schema_version": SCHEMA_VERSION, "processes": processes, **state}
    _write_json(directory / STATE_FILE, document | {"checksum": _of_state(document)})
    sync_directory(directory)


def read_state(directory: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint.

    Raises:
        TrainingError: it cannot be read or does not match its checksum.
        OtherVersion: another version of this package wrote it.
    """
    try:
        state: dict[str, Any] = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        version, checksum = state["schema_version"], state.pop("checksum", None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{STATE_FILE} cannot be read ({type(error).__name__})") from None
    if version != SCHEMA_VERSION:
        raise OtherVersion(
            f"{directory} was written by another version of qwen2kit (schema {version}, this one "
            f"reads {SCHEMA_VERSION}); start a new run"
        )
    if checksum != _of_state(state):
        raise TrainingError(f"{STATE_FILE} does not match its checksum")
    return state


class OtherVersion(TrainingError):
    """A checkpoint is not damaged, but of another version."""


def verify_files(directory: Path, processes: int, *, rank: int, world: int) -> None:
    """Check this process's share of the files of a checkpoint that ``processes`` processes wrote.

    Raises:
        TrainingError: a list or a file is missing or does not match its checksum.
    """
    files: dict[str, str] = {}
    for writer in range(processes):
        try:
            files |= json.loads((directory / _list_name(writer)).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(
                f"{_list_name(writer)} cannot be read ({type(error).__name__})"
            ) from None
    for name in sorted(files)[rank::world]:
        path = directory / name
        if Path(name).name != name or not path.is_file() or _checksum(path) != files[name]:
            raise TrainingError(f"{name} does not match its checksum")


def _list_name(rank: int) -> str:
    return f"files-{rank:05d}.json"


def _durable(path: Path) -> str:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return _checksum(path)


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return _spelled(value)


def _of_state(state: dict[str, Any]) -> str:
    return _spelled(zlib.crc32(json.dumps(state, sort_keys=True).encode()))


def _spelled(value: int) -> str:
    return f"crc32:{value:08x}"


def _write_json(path: Path, document: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
