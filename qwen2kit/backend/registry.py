"""Backends by name, through the entry-point group ``qwen2kit.backends``.

Our own two use the same door as third parties. Listing reads package metadata only; nothing is
imported before `get`.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

from qwen2kit.backend.protocol import PROTOCOL_VERSION, Backend
from qwen2kit.backend.values import BackendInfo
from qwen2kit.errors import BackendError, MissingExtra

GROUP = "qwen2kit.backends"
_FRAMEWORK = {"torch": "torch", "mlx": "mlx"}


def available() -> tuple[BackendInfo, ...]:
    """All registered backends, whether or not their framework is installed."""
    return tuple(_info(name, entry) for name, entry in sorted(_entries().items()))


def get(name: str) -> Backend:
    """Load the backend called ``name``; ``auto`` is the first installed of torch and mlx.

    Raises:
        MissingExtra: its framework is not installed.
        BackendError: no such backend, or it speaks another protocol version.
    """
    entries = _entries()
    if name == "auto":
        name = _default(entries)
    if name not in entries:
        raise BackendError(
            f"unknown backend {name!r}; registered: {', '.join(sorted(entries)) or 'none'}"
        )
    info = _info(name, entries[name])
    if not info.installed:
        raise MissingExtra(name, _FRAMEWORK.get(name, name))
    try:
        backend: Backend = entries[name].load()()
    except ImportError as error:
        raise BackendError(f"backend {name!r} cannot be imported: {error}") from error
    if backend.protocol_version != PROTOCOL_VERSION:
        raise BackendError(
            f"backend {name!r} speaks protocol {backend.protocol_version}, this qwen2kit needs "
            f"{PROTOCOL_VERSION}; upgrade {entries[name].module.split('.')[0]}"
        )
    return backend


def installed() -> tuple[str, ...]:
    """Names of the backends whose framework is present."""
    return tuple(info.name for info in available() if info.installed)


def _entries() -> dict[str, EntryPoint]:
    return _entries_on(tuple(sys.path))


@lru_cache(maxsize=1)  # reading the metadata of every installed package takes 10 ms and more
def _entries_on(path: tuple[str, ...]) -> dict[str, EntryPoint]:
    del path
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _info(name: str, entry: EntryPoint) -> BackendInfo:
    framework = _FRAMEWORK.get(name)
    missing = framework is not None and find_spec(framework) is None
    reason = f"pip install 'qwen2kit[{name}]'" if missing else ""
    return BackendInfo(name, entry.module, not missing, reason)


def _default(entries: dict[str, EntryPoint]) -> str:
    for name in ("torch", "mlx", *sorted(entries)):
        if name in entries and _info(name, entries[name]).installed:
            return name
    raise MissingExtra("all", "torch or mlx")
