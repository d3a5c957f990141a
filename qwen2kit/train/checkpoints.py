"""Checkpoints of a run on disk: complete or absent, checked on reading, pruned to the newest.

``checkpoints/step-00000300/`` holds what the backend's ``save_state`` wrote on every process, a
list with checksums from each, and ``state.json``. A checkpoint is built under a hidden name while
training goes on, flushed to disk, and renamed when all processes are done. One that it replaces
(the run went back past a damaged one) is set aside whole until then, and found again after a kill
in between. All methods are collective.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2kit.backend.processes import Processes, SingleProcess
from qwen2kit.backend.protocol import Saving
from qwen2kit.errors import PeerError, TrainingError, WeightError
from qwen2kit.partial_file import reason_of, sync_directory
from qwen2kit.train.agreement import on_first, settle, together
from qwen2kit.train.checkpoint_files import (
    OtherVersion,
    Receipt,
    read_state,
    verify_files,
    write_state,
)
from qwen2kit.weights.staging import bring_back, put_in_place

_NAME = re.compile(r"step-(\d{8,})")
_REPLACED = ".replaced"
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Restored:
    """The state that was read, and one warning per newer checkpoint that could not be."""

    state: State
    path: Path
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A checkpoint in flight."""

    step: int
    state: State
    partial: Path
    receipt: Receipt


class CheckpointStore:
    """The checkpoints of one run; at most one is being written at a time.

    Args:
        directory: holds the ``step-*`` directories; created on first use.
        keep: how many of the newest survive a save.
        processes: who writes.
    """

    def __init__(self, directory: Path, keep: int, processes: Processes | None = None) -> None:
        self.directory = directory
        self.keep = keep
        self._processes = processes or SingleProcess()
        self._pending: _Pending | None = None

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is in flight (the same on all processes)."""
        return self._pending is not None

    @property
    def busy(self) -> bool:
        """Whether this process has not yet done its part of it."""
        return self._pending is not None and not self._pending.receipt.done()

    def paths(self) -> list[Path]:
        """Existing checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step)

    def begin(self, step: int, state: State, write: Callable[[Path], Saving]) -> None:
        """Store ``state`` and whatever ``write`` puts into the directory it is given.

        Returns as soon as ``write`` does; `publish` or `finish` completes it.

        Raises:
            TrainingError: the disk is full or not writable (at this or the previous checkpoint);
                earlier checkpoints are untouched.
        """
        self.finish()
        partial = self.directory / f".step-{step:08d}.partial"
        together(self._processes, lambda: self._prepare(step, partial))
        try:
            saving = write(partial)
        except OSError as error:
            saving = _FailedSaving(error)
        receipt = Receipt(saving, partial, self._processes.rank)
        self._pending = _Pending(step, state, partial, receipt)

    def publish(self) -> None:
        """Give the checkpoint in flight its name; no process may be `busy` any more.

        Raises:
            TrainingError: it could not be written completely.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            settle(self._processes, self._explained(pending.step, pending.receipt.error))
            together(self._processes, lambda: self._complete(pending))
        except BaseException:
            if self._processes.rank == 0:
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise

    def finish(self) -> None:
        """Wait for the checkpoint in flight and `publish` it; no-op if there is none."""
        if self._pending is not None:
            self._pending.receipt.wait()
            self.publish()

    def restore(self, read: Callable[[Path, State], None]) -> Restored | None:
        """Load the newest intact checkpoint through ``read``; None if there is none at all.

        Raises:
            TrainingError: checkpoints exist but every one is damaged, or the newest is of another
                version.
            OSError: the directory cannot be read or changed.
        """
        warnings: list[str] = []
        for name in on_first(self._processes, self._names):
            path = self.directory / name
            state, problem = self._load(path, read)
            if problem is None:
                return Restored(state, path, tuple(warnings))
            warnings.append(f"checkpoint {name} is damaged and is passed over: {problem}")
        if warnings:
            raise TrainingError(f"no intact checkpoint in {self.directory}: {warnings[0]}")
        return None

    def _names(self) -> list[str]:
        """Existing checkpoints, newest first, with those that a kill has left set aside."""
        self._bring_back()
        return [path.name for path in reversed(self.paths())]

    def _bring_back(self) -> None:
        for retired in self.directory.glob(f".step-*{_REPLACED}"):
            bring_back(retired.with_name(retired.name[1:].removesuffix(_REPLACED)), retired)

    def _load(
        self, path: Path, read: Callable[[Path, State], None]
    ) -> tuple[State, Exception | None]:
        state: State = {}
        problem = self._problem(lambda: state.update(self._verify(path)))
        return state, problem or self._problem(lambda: read(path, state))

    def _verify(self, path: Path) -> State:
        state = read_state(path)
        rank, world = self._processes.rank, self._processes.world
        verify_files(path, state["processes"], rank=rank, world=world)
        return state

    def _problem(self, work: Callable[[], None]) -> Exception | None:
        """What is wrong with a checkpoint, if ``work`` finds anything on any process."""
        problem: Exception | None = None
        try:
            work()
        except (OtherVersion, PeerError):
            raise
        except (TrainingError, WeightError, OSError) as error:
            problem = error
        if self._processes.any(problem is not None):
            return problem or TrainingError("another process cannot read it")
        return None

    def _prepare(self, step: int, partial: Path) -> None:
        if self._processes.rank == 0:
            try:
                self.sweep()
                partial.mkdir(parents=True)
            except OSError as error:
                raise self._failure(step, error) from error

    def sweep(self) -> None:
        """Remove what a run that was killed while saving has left (process 0 only)."""
        self._bring_back()
        for kind in (".partial", _REPLACED):
            for leftover in self.directory.glob(f".step-*{kind}"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _complete(self, pending: _Pending) -> None:
        if self._processes.rank:
            return
        final = self.directory / f"step-{pending.step:08d}"
        retired = self.directory / f".{final.name}{_REPLACED}"
        state = {"step": pending.step, **pending.state}
        try:
            write_state(pending.partial, state, self._processes.world)
            put_in_place(pending.partial, final, retired)
            sync_directory(self.directory)
            shutil.rmtree(retired, ignore_errors=True)
        except OSError as error:
            raise self._failure(pending.step, error) from error
        # A newer one can only be damaged (the run has gone back past it): it is not counted.
        saved = [path for path in self.paths() if _step(path) <= pending.step]
        for old in saved[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _explained(self, step: int, error: Exception | None) -> Exception | None:
        return self._failure(step, error) if isinstance(error, OSError) else error

    def _failure(self, step: int, error: OSError) -> TrainingError:
        kept = self.paths()
        rest = f"{kept[-1].name} is intact" if kept else "no earlier checkpoint exists"
        return TrainingError(
            f"cannot save step {step} in {self.directory}: {reason_of(error)}; {rest}"
        )


class _FailedSaving:
    """A save that failed on this process before it began."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def done(self) -> bool:
        return True

    def wait(self) -> tuple[str, ...]:
        raise self._error


def _step(path: Path) -> int:
    return int(path.name[5:])
