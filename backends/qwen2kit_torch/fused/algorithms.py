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
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch

from qwen2kit.partial_file import write_text_atomically
from qwen2kit_torch.fused.cublaslt import Problem, version

# A gain below this is noise, and then PyTorch's own call is as good.
_WORTHWHILE = 0.985
_ROUNDS = 3
_FINALISTS = 4
# A GPU under full load lowers its clock within tens of milliseconds, the more the hungrier the
# kernel: what wins a sprint may lose there, and training is no sprint.
_SUSTAINED_MS = 50.0


def fastest(ways: Mapping[bytes, Callable[[], None]]) -> bytes:
    """The key of the quickest of ``ways`` on the current CUDA stream under sustained load.

    Args:
        ways: launchers; the empty key, if there is one, is the default, which others must clearly
            beat.
    """
    for launch in ways.values():
        launch()
    sprint = _medians({key: partial(_milliseconds, run, 2) for key, run in ways.items()})
    finalists = sorted(ways, key=lambda key: sprint[key])[:_FINALISTS]
    if b"" in ways and b"" not in finalists:
        finalists.append(b"")
    return quickest(
        _medians({key: partial(_sustained, ways[key], sprint[key]) for key in finalists})
    )


def quickest(milliseconds: Mapping[bytes, float]) -> bytes:
    """The key of the least time, or the empty one if it is hardly slower."""
    best = min(milliseconds, key=lambda key: milliseconds[key])
    default = milliseconds.get(b"", inf)
    return best if milliseconds[best] < _WORTHWHILE * default else b""


def _medians(measures: Mapping[bytes, Callable[[], float]]) -> dict[bytes, float]:
    """Of several rounds, in which all take turns."""
    rounds = [{key: measure() for key, measure in measures.items()} for _ in range(_ROUNDS)]
    return {key: statistics.median(row[key] for row in rounds) for key in measures}


def _sustained(launch: Callable[[], None], expected: float) -> float:
    """Milliseconds a launch once the GPU has been busy with it for a while."""
    count = max(2, round(_SUSTAINED_MS / 2 / expected))
    for _ in range(count):
        launch()
    return _milliseconds(launch, count)


def _milliseconds(launch: Callable[[], None], count: int) -> float:
    begin, end = (_event() for _ in range(2))
    begin.record()
    for _ in range(count):
        launch()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / count


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


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
                text = json.dumps(self._known, indent=0, sort_keys=True)
                write_text_atomically(self.path, text + "\n")
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
