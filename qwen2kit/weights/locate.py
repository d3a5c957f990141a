"""From what the user typed (directory, run, GGUF file or hub id) to a path that can be opened."""

from __future__ import annotations

import re
from pathlib import Path

from qwen2kit.errors import WeightError

ADAPTER_CONFIG = "adapter_config.json"
_CONFIGS = ("config.json", ADAPTER_CONFIG)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.tiktoken")


def locate(model: str) -> Path:
    """A model directory (HF or MLX layout), an adapter directory, or a ``.gguf`` file.

    Args:
        model: existing directory, run directory of ``qwen2kit train``, ``.gguf`` file, or hub id
            ``org/name`` (downloaded; only safetensors and text files, never pickles).

    Raises:
        WeightError: nothing there, an unfinished run, or the download failed; the message says
            what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise WeightError(
                f"{path}: is a file but not .gguf; give the model's directory instead"
            )
        return path
    if _HUB_ID.fullmatch(model) and path.suffix.lower() != ".gguf":
        return _download(model)
    raise WeightError(f"{model}: no such file or directory (and not a hub id of the form org/name)")


def latest_run(root: Path) -> Path | None:
    """The run directory under ``root`` whose finished ``model/`` is newest, or None."""
    if not root.is_dir():
        return None
    finished = [
        (config.stat().st_mtime_ns, run.name, run)
        for run in root.iterdir()
        if (config := _config_of(run / "model")) is not None
    ]
    return max(finished)[2] if finished else None


def _in_directory(path: Path) -> Path:
    for directory in (path, path / "model"):
        if _config_of(directory) is not None:
            return directory
    if (path / "run.json").is_file():
        raise WeightError(
            f"{path}: this run has no finished model; resume it with: "
            f"qwen2kit train --resume {path}"
        )
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise WeightError(
            f"{path}: holds {len(ggufs)} GGUF files; name one, for example {ggufs[0]}"
        )
    raise WeightError(f"{path}: no config.json and no .gguf file; this is not a model directory")


def _config_of(directory: Path) -> Path | None:
    """The file that makes ``directory`` a model or an adapter, or None."""
    return next((file for name in _CONFIGS if (file := directory / name).is_file()), None)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except GatedRepoError as error:
        raise WeightError(
            f"{model}: the hub asks for a licence agreement; accept it on the model's page and "
            "run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightError(
            f"{model}: no such local path, and no such model on the hub (for a private model run: "
            "hf auth login)"
        ) from error
    except Exception as error:  # every other failure is the network's or the cache's
        raise WeightError(
            f"{model}: no such local path, and the hub cannot be reached "
            f"({type(error).__name__}); connect, or give the path of a downloaded model"
        ) from error
