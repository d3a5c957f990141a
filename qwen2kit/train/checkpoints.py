"""Checkpoints of a run on disk: complete or absent, checked on reading, pruned to the newest.

``checkpoints/step-00000300/`` holds what the backend's ``save_state`` wrote and ``state.json``.
A checkpoint is built under a hidden name, flushed to disk and then renamed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2kit.errors import Qwen2KitError, TrainingError
from qwen2kit.weights.safetensors_write import sync_directory

STATE_FILE = "state.json"
SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Restored:
    """The state that was read, and one warning per newer checkpoint that could not be."""

    state: dict[str, Any]
    path: Path
    warnings: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: holds the ``step-*`` directories; created on first use.
        keep: how many of the newest survive a save.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def paths(self) -> list[Path]:
        """Existing checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Store ``state`` and whatever ``write`` puts into the directory it is given.

        Raises:
            TrainingError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        final = self.directory / f"step-{step:08d}"
        partial = self.directory / f".{final.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write(partial)
            _write_state(partial, {"schema_version": SCHEMA_VERSION, "step": step, **state})
            if final.exists():
                shutil.rmtree(final)
            partial.replace(final)
            sync_directory(self.directory)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._failure(step, error) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def restore(self, read: Callable[[Path], None]) -> Restored | None:
        """Load the newest intact checkpoint through ``read``; None if there is none at all.

        Raises:
            TrainingError: checkpoints exist but every one is damaged.
        """
        warnings: list[str] = []
        for path in reversed(self.paths()):
            try:
                state = _read_state(path)
                read(path)
            except (Qwen2KitError, OSError) as error:
                warnings.append(f"checkpoint {path.name} is damaged and is passed over: {error}")
                continue
            return Restored(state, path, tuple(warnings))
        if warnings:
            raise TrainingError(f"no intact checkpoint in {self.directory}: {warnings[0]}")
        return None

    def _failure(self, step: int, error: OSError) -> TrainingError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "no space left on the disk" if full else error.strerror or str(error)
        kept = self.paths()
        rest = f"{kept[-1].name} is intact" if kept else "no earlier checkpoint exists"
        return TrainingError(f"cannot save step {step} in {self.directory}: {reason}; {rest}")


def _write_state(directory: Path, state: dict[str, Any]) -> None:
    checksums = {path.name: _checksum(path) for path in sorted(directory.iterdir())}
    text = json.dumps(state | {"files": checksums}, indent=2, allow_nan=False)
    (directory / STATE_FILE).write_text(text + "\n", encoding="utf-8")
    for path in directory.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_directory(directory)


def _read_state(directory: Path) -> dict[str, Any]:
    try:
        state = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        version, files = state["schema_version"], dict(state["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{STATE_FILE} cannot be read ({type(error).__name__})") from None
    if version != SCHEMA_VERSION:
        raise TrainingError(f"{STATE_FILE} has schema version {version}, not {SCHEMA_VERSION}")
    for name, checksum in files.items():
        if Path(name).name != name or _checksum(directory / name) != checksum:
            raise TrainingError(f"{name} does not match its checksum")
    return dict(state)


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"crc32:{value:08x}"
