"""Benchmark data from a local directory in Hub layout, from any working directory, offline.

``DIR/<org>/<name>`` stands for the Hub data set ``<org>/<name>``: data files with a card
(README.md) that maps configs and splits to them, as a Hub download has it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from qwen2kit.errors import DataError

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class LocalData:
    """Data sets below one directory.

    Raises:
        DataError: ``root`` is not a directory.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().resolve()
        if not self.root.is_dir():
            raise DataError(f"--datasets {root}: no such directory")

    def find(self, name: str) -> Path | None:
        """Directory of the Hub data set ``name``, or None."""
        if not _NAME.fullmatch(name) or ".." in name:
            return None
        path = self.root / name
        return path if path.is_dir() else None

    def expected(self, name: str) -> Path:
        """Where ``name`` would have to be."""
        return self.root / name

    def configs(self, name: str) -> tuple[str, ...]:
        """Config names of a data set that `find` knows."""
        return _configs(self.root / name)

    def splits(self, name: str, config: str | None) -> tuple[str, ...]:
        """Split names of one config.

        Raises:
            DataError: no such config, or several and ``config`` is None.
        """
        known = self.configs(name)
        if config is not None and config not in known:
            raise DataError(
                f"{self.root / name} has no config {config!r}; present: {', '.join(known[:8])}"
            )
        try:
            return _splits(self.root / name, config)
        except Exception as error:
            raise DataError(f"{self.root / name} cannot be read: {_first_line(error)}") from error


@cache
def _configs(path: Path) -> tuple[str, ...]:
    import datasets

    with offline():
        return tuple(datasets.get_dataset_config_names(str(path)))


@cache
def _splits(path: Path, config: str | None) -> tuple[str, ...]:
    import datasets

    with offline():
        builder = datasets.load_dataset_builder(str(path), config)
    return tuple(str(split) for split in builder.config.data_files or ())


def own_cache(path: Path) -> Path:
    """Where ``datasets`` may keep what it reads from ``path``, as its files are now.

    Left to itself it takes another directory with a set of the same name, or an earlier state of
    this one, for the same data.
    """
    import datasets.config

    files = sorted(file for file in path.rglob("*") if file.is_file())
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return Path(datasets.config.HF_DATASETS_CACHE) / "local" / digest


@contextmanager
def offline() -> Iterator[None]:
    """No Hub access: an absent data set fails at once instead of after retries.

    The libraries read the environment when imported, so their settings change with it.
    """
    import datasets.config
    from huggingface_hub import constants

    environment = {key: os.environ.get(key) for key in _OFFLINE}
    settings: list[tuple[Any, str, Any]] = [
        (module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE) for module in (constants, datasets.config)
    ]
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    for module, key, _ in settings:
        setattr(module, key, True)
    try:
        yield
    finally:
        for module, key, value in settings:
            setattr(module, key, value)
        for key, before in environment.items():
            if before is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = before


@contextmanager
def local_datasets(data: LocalData | None) -> Iterator[None]:
    """``datasets.load_dataset`` reads Hub names that ``data`` holds from disk; no network.

    Without ``data`` nothing changes.
    """
    if data is None:
        yield
        return
    import datasets

    original = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        local = data.find(path)
        if local is None:
            return original(path, *args, **kwargs)
        return original(str(local), *args, **{"cache_dir": str(own_cache(local)), **kwargs})

    datasets.load_dataset = load_dataset
    try:
        with offline(), _quiet_progress():
            yield
    finally:
        datasets.load_dataset = original


@contextmanager
def _quiet_progress() -> Iterator[None]:
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def is_file_format(path: str) -> bool:
    """Whether ``dataset_path`` names a loader for plain files (json, parquet, ...), not data."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return path in _PACKAGED_DATASETS_MODULES


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
