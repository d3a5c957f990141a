"""Output that appears only when complete: built beside its final place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen2kit.errors import ConfigError
from qwen2kit.weights.locate import ADAPTER_CONFIG


@contextmanager
def staged_directory(out: Path, *, force: bool) -> Iterator[Path]:
    """A new directory that becomes ``out`` when the block ends, or vanishes if it raises.

    Raises:
        ConfigError: ``out`` is in the way and may not be replaced (see `refuse_overwrite`).
    """
    refuse_overwrite(out, force=force)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.partial-{os.getpid()}")
    staging.mkdir()
    try:
        yield staging
        retired = out.with_name(f".{out.name}.replaced-{os.getpid()}")
        put_in_place(staging, out, retired)
        if retired.exists():
            shutil.rmtree(retired)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def put_in_place(new: Path, out: Path, retired: Path) -> None:
    """Rename ``new`` to ``out``. What is there becomes ``retired`` first, whole, so that there is
    never half of it under its name; it comes back if ``new`` cannot take its place.

    A kill between the two leaves both complete and neither under its name: `bring_back`.
    """
    if out.exists():
        out.rename(retired)
    try:
        new.rename(out)
    except BaseException:
        bring_back(out, retired)
        raise


def bring_back(out: Path, retired: Path) -> None:
    """Give ``retired`` its name again where nothing has it. Raises OSError."""
    if retired.exists() and not out.exists():
        retired.rename(out)


def refuse_overwrite(out: Path, *, force: bool) -> None:
    """ConfigError if writing ``out`` would destroy something.

    An empty directory may be filled. ``force`` allows replacing a model or an adapter (a directory
    with its config, or a ``.gguf`` file), never any other directory.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() or out.is_file())):
        raise ConfigError(f"{out}: is not a plain file or directory; choose another output")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise ConfigError(f"{out}: already exists and is not empty; use --force to replace it")
        if not any((out / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise ConfigError(
                f"{out}: is not a model directory, so even --force does not replace it; "
                "choose another output"
            )
    if out.is_file() and not (force and out.suffix.lower() == ".gguf"):
        raise ConfigError(f"{out}: already exists; use --force to replace a .gguf file")
