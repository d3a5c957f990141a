"""Which of cuBLASLt's algorithms computes a product: measured once, then remembered on disk.

Another algorithm may add up in another order, so a run that is resumed must find the choice it
began with. It is kept in ``$XDG_CACHE_HOME/qwen2kit`` (``~/.cache/qwen2kit``), in one file for
each GPU model and library version, and whoever measures first decides for all processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from qwen2kit_torch.fused.cublaslt import Problem, version

# A gain below this is noise, and then PyTorch's own call is as good.
_WORTHWHILE = 0.99
_ROUNDS = 5
_REPEATS = 2


def fastest(ways: Mapping[bytes, Callable[[], None]]) -> bytes:
    """The key of the quickest of ``ways`` on the current CUDA stream.

    They take turns, since a GPU's clock falls while it is busy.

    Args:
        ways: launchers; the empty key is the default, which others must clearly beat.
    """
    for launch in ways.values():
        launch()
    seconds: dict[bytes, list[float]] = {key: [] for key in ways}
    for _ in range(_ROUNDS):
        for key, launch in ways.items():
            begin, end = _event(), _event()
            begin.record()
            for _ in range(_REPEATS):
                launch()
            end.record()
            end.synchronize()
            seconds[key].append(begin.elapsed_time(end))
    return quickest({key: statistics.median(many) for key, many in seconds.items()})


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def quickest(seconds: Mapping[bytes, float]) -> bytes:
    """The key of the least time, or the empty one if that is less than 1 % slower."""
    best = min(seconds, key=lambda key: seconds[key])
    return best if seconds[best] < _WORTHWHILE * seconds[b""] else b""


class Remembered:
    """Choices in a JSON file: problem to algorithm in hexadecimal; empty is PyTorch's own call.

    Args:
        path: the file; it and its folder need not exist. What cannot be read or written is done
            without.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = _read(path)

    def get(self, problem: Problem) -> bytes | None:
        """The choice for ``problem``, or None."""
        found = self._known.get(_key(problem))
        return None if found is None else bytes.fromhex(found)

    def settle(self, problem: Problem, choice: bytes) -> bytes:
        """Write ``choice`` down unless another process was quicker; the choice that holds."""
        key = _key(problem)
        try:
            with _locked(self.path):
                self._known = {**self._known, **_read(self.path)}
                self._known.setdefault(key, choice.hex())
                fresh = self.path.with_suffix(f".{os.getpid()}")
                fresh.write_text(json.dumps(self._known, indent=0, sort_keys=True) + "\n")
                fresh.replace(self.path)
        except OSError:
            self._known.setdefault(key, choice.hex())
        return bytes.fromhex(self._known[key])


def remembered(device: int) -> Remembered:
    """The choices for this GPU model and library version."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return Remembered(Path(home) / "qwen2kit" / f"cublaslt-{version()}-{name}.json")


def _key(problem: Problem) -> str:
    return " ".join(str(field).removeprefix("torch.") for field in astuple(problem))


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
        return {str(key): bytes.fromhex(value).hex() for key, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
