"""What installed distributions register under a name, read from their metadata alone."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from qwen2kit.errors import BackendError


def entries(group: str) -> dict[str, EntryPoint]:
    """The entry points of ``group`` by name."""
    return _entries_on(group, tuple(sys.path))


@lru_cache(maxsize=2)  # reading the metadata of every installed package takes 10 ms and more
def _entries_on(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    del path
    return {entry.name: entry for entry in entry_points(group=group)}


def entry(group: str, kind: str, name: str) -> EntryPoint:
    """The one called ``name``.

    Args:
        kind: what the group's entries are, for the message.

    Raises:
        BackendError: there is none.
    """
    known = entries(group)
    if name not in known:
        raise BackendError(
            f"unknown {kind} {name!r}; registered: {', '.join(sorted(known)) or 'none'}"
        )
    return known[name]
