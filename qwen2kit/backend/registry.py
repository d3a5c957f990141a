"""Backends by name, through the entry-point group ``qwen2kit.backends``.

Our own two use the same door as third parties. Listing reads package metadata only; nothing is
imported before `get`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint
from importlib.util import find_spec

from qwen2kit.backend.entries import entries, entry
from qwen2kit.backend.protocol import PROTOCOL_VERSION, Backend
from qwen2kit.backend.values import BackendInfo
from qwen2kit.errors import BackendError, MissingExtra

GROUP = "qwen2kit.backends"
_FRAMEWORK = {"torch": "torch", "mlx": "mlx"}


def available() -> tuple[BackendInfo, ...]:
    """All registered backends, whether or not their framework is installed."""
    return tuple(_info(name, found) for name, found in sorted(entries(GROUP).items()))


def get(name: str) -> Backend:
    """Load the backend called ``name``; ``auto`` is the first installed of torch and mlx.

    Raises:
        MissingExtra: its framework is not installed.
        BackendError: no such backend, or it speaks another protocol version.
    """
    if name == "auto":
        name = _default()
    found = entry(GROUP, "backend", name)
    info = _info(name, found)
    if not info.installed:
        raise MissingExtra(name, _FRAMEWORK.get(name, name))
    try:
        backend: Backend = found.load()()
    except ImportError as error:
        raise BackendError(f"backend {name!r} cannot be imported: {error}") from error
    if backend.protocol_version != PROTOCOL_VERSION:
        raise BackendError(
            f"backend {name!r} speaks protocol {backend.protocol_version}, this qwen2kit needs "
            f"{PROTOCOL_VERSION}; upgrade {found.module.split('.')[0]}"
        )
    return backend


def installed() -> tuple[str, ...]:
    """Names of the backends whose framework is present."""
    return tuple(info.name for info in available() if info.installed)


def _info(name: str, found: EntryPoint) -> BackendInfo:
    framework = _FRAMEWORK.get(name)
    missing = framework is not None and find_spec(framework) is None
    reason = f"pip install 'qwen2kit[{name}]'" if missing else ""
    return BackendInfo(name, found.module, not missing, reason)


def _default() -> str:
    known = entries(GROUP)
    for name in ("torch", "mlx", *sorted(known)):
        if name in known and _info(name, known[name]).installed:
            return name
    raise MissingExtra("all", "torch or mlx")
