"""Weights and AdamW moments on disk, by torch.distributed.checkpoint in safetensors files.

Every process writes its own part; any number of processes reads it back. Tensors are called
``<parameter>``, ``exp_avg.<parameter>``, ``exp_avg_sq.<parameter>`` and ``step``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from qwen2kit.errors import WeightError

# A single process is what was asked for, and the warning would come from a background thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")

Parameters = Mapping[str, nn.Parameter]

# A single process is no mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class BackgroundSave:
    """`qwen2kit.backend.protocol.Saving` of one process.

    Args:
        future: completes when this process has written its files.
        directory: where they are.
        rank: of this process, which names its files.
    """

    def __init__(self, future: Future[object], directory: Path, rank: int) -> None:
        self._future, self._directory = future, directory
        self._prefix = f"shard-{rank + 1:05d}-"

    def done(self) -> bool:
        """Whether this process has nothing left to write (or failed)."""
        return self._future.done()

    def wait(self) -> tuple[str, ...]:
        """Block until then; names of the files. Raises OSError."""
        try:
            self._future.result()
        except (Exception, CheckpointException) as error:
            raise _disk_error(error) from error
        return tuple(sorted(p.name for p in self._directory.glob(f"{self._prefix}*")))


def save_state(
    directory: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None,
) -> BackgroundSave:
    """Copy the state to host memory and begin to write it.

    Args:
        parameters: those that train, of this process; copies of another stage's left out.
        group: all processes, for talk in the background (gloo); None for a single one.
    """
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    future = async_save(
        _state(parameters, optimizer),
        storage_writer=writer,
        process_group=group,
        no_dist=group is None,
    )
    assert isinstance(future, Future)
    return BackgroundSave(future, directory, 0 if group is None else group.rank())


def restore_state(
    directory: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None,
    *,
    everything: bool,
) -> int:
    """Read what `save_state` wrote into ``parameters`` and ``optimizer``.

    Args:
        everything: ``parameters`` are all that was saved, not one pipeline stage's.

    Returns how many optimizer steps had been made.

    Raises:
        WeightError: a file is missing or damaged, or belongs to another model.
    """
    reader = HuggingFaceStorageReader(str(directory))
    try:
        saved = reader.read_metadata().state_dict_metadata
        started = STEP in saved
        optimizer.state.clear()
        if started:
            _make_moments(parameters, optimizer)
        state = _state(parameters, optimizer)
        _check(directory, saved, state, everything)
        load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    except (
        SafetensorError, OSError, ValueError, KeyError, RuntimeError, CheckpointException
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightError(f"{directory} cannot be read: {reason}") from error
    if not started:
        return 0
    count = state[STEP].reshape(())
    for parameter in parameters.values():
        optimizer.state[parameter][STEP].copy_(count)
    return int(count)


def _state(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {name: p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter)
        if not moments:
            continue
        state[STEP] = moments[STEP].detach().reshape(1).cpu()
        state |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS}
    return state


def _make_moments(parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
    for parameter in parameters.values():
        value = parameter.detach()
        device = value.to_local().device if isinstance(value, DTensor) else value.device
        # Fused AdamW keeps the count beside the parameter.
        optimizer.state[parameter] = {
            STEP: torch.zeros((), dtype=torch.float32, device=device),
            **{moment: torch.zeros_like(value) for moment in MOMENTS},
        }


def _check(
    directory: Path, saved: Mapping[str, object], wanted: Mapping[str, Tensor], everything: bool
) -> None:
    wrong = {name for name, tensor in wanted.items() if not _fits(saved.get(name), tensor)}
    if everything:
        wrong |= saved.keys() - wanted.keys()
    if wrong:
        raise WeightError(
            f"{directory} is of another model or incomplete: {', '.join(sorted(wrong)[:3])} "
            "missing or different"
        )


def _fits(saved: object, tensor: Tensor) -> bool:
    if not isinstance(saved, TensorStorageMetadata) or saved.size != tensor.shape:
        return False
    stored = sum(prod(chunk.sizes) for chunk in saved.chunks)
    return saved.properties.dtype == tensor.dtype and stored == tensor.numel()


def _disk_error(error: BaseException) -> BaseException:
    """The OSError at the bottom of ``error``, which DCP wraps once per process."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        failures = getattr(seen, "failures", None)
        if failures:
            found = _disk_error(next(iter(failures.values()))[0])
            if isinstance(found, OSError):
                return found
        seen = seen.__cause__ or seen.__context__
    return OSError(5, f"checkpoint not written: {error}")
