"""A trace of training steps for chrome://tracing and Perfetto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def profile_into(directory: Path, rank: int) -> Iterator[None]:
    """Write ``directory/trace-rank<rank>.json.gz`` of everything that ran inside the context."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    directory.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(directory / f"trace-rank{rank}.json.gz"))
