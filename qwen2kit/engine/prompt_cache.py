"""A read prompt on disk: its keys and values as safetensors, so that it is never read again.

The file holds what `PersistentSlots.export` gave, the token ids as ``tokens`` (int32) and, as
metadata, what it is and which model made it. Whatever does not fit is refused in one line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qwen2kit.errors import BackendError, WeightError
from qwen2kit.weights.checkpoint import Checkpoint
from qwen2kit.weights.safetensors_read import SafetensorsFile
from qwen2kit.weights.safetensors_write import write_safetensors
from qwen2kit.weights.tensor import HostTensor, from_numpy

if TYPE_CHECKING:
    from qwen2kit.engine.engine import Engine

FORMAT: Final = "qwen2kit prompt 1"
_TOKENS: Final = "tokens"
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def save_prompt(path: Path, engine: Engine, tokens: Sequence[int], fingerprint: str) -> int:
    """Write what the engine still holds of a prompt.

    Args:
        path: the file; an older one is replaced once the new one is complete.
        engine: has run the prompt, and nothing since that needed its slot.
        tokens: the prompt's ids.
        fingerprint: of the model, see `model_fingerprint`.

    Returns:
        How many of the tokens the file holds.

    Raises:
        BackendError: the backend cannot save slots, or none holds the prompt any more.
        OSError: the disk is full or not writable.
    """
    import numpy as np

    length, tensors = engine.export(tokens)
    if not length:
        raise BackendError("no slot holds this prompt any more; save it right after it was read")
    ids = from_numpy(np.array(tokens[:length], dtype=np.int32))
    metadata = {"format": FORMAT, "model": fingerprint}
    write_safetensors(path, [(_TOKENS, ids), *tensors], metadata=metadata)
    return length


def load_prompt(path: Path, engine: Engine, fingerprint: str) -> tuple[int, ...]:
    """Put a saved prompt into a free slot; prompts that begin with it build upon it.

    Args:
        path: what `save_prompt` wrote.
        engine: of the same model, computing in the same dtype.
        fingerprint: of the model, see `model_fingerprint`.

    Returns:
        The prompt's ids.

    Raises:
        WeightError: the file is absent, damaged, not a saved prompt, or of another model, dtype or
            form of cache.
        BackendError: the backend cannot restore slots, all are taken, or the prompt is too long.
    """
    file = _opened(path)
    if file.metadata.get("model") != fingerprint:
        raise WeightError(f"{path.name} was made by another model; read the prompt again")
    tokens = tuple(int(token) for token in file.read(_TOKENS).raw().reshape(-1))
    engine.restore(tokens, _columns(file, len(tokens)))
    return tokens


def saved_length(path: Path) -> int:
    """Tokens of a saved prompt. Raises WeightError if it is none."""
    return _opened(path).info(_TOKENS).shape[0]


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over a model's spec and samples of its weight files (and its adapter's): other
    weights give another one, wherever the files lie."""
    digest = hashlib.sha256(repr(checkpoint.spec).encode())
    for path in _weight_files(checkpoint):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(size * index // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _opened(path: Path) -> SafetensorsFile:
    if not path.is_file():
        raise WeightError(f"there is no saved prompt at {path}")
    file = SafetensorsFile(path)
    if file.metadata.get("format") != FORMAT or _TOKENS not in file.names():
        raise WeightError(f"{path.name} is not a saved prompt of this version; read it again")
    return file


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    places = [place for place in (checkpoint.path, checkpoint.adapter) if place is not None]
    return [
        path
        for place in places
        for path in ([place] if place.is_file() else sorted(place.glob("*.safetensors")))
    ]


def _columns(file: SafetensorsFile, length: int) -> Iterator[tuple[str, HostTensor]]:
    for name in file.names():
        if name == _TOKENS:
            continue
        tensor = file.read(name)
        if len(tensor.shape) != 3 or tensor.shape[1] != length:
            raise WeightError(
                f"{file.path.name}: {name} is {list(tensor.shape)}, not of {length} tokens; read "
                "the prompt again"
            )
        yield name, tensor
