"""What a backend must provide. The seam is the whole model: core never sees an op or a module.

Required: `Backend` and `CompiledModel`. Optional powers are separate protocols that
`Capabilities` announces: `TrainableModel` (with adapters: `AdapterModel`) and
`DistributedBackend`. Third parties register under the entry-point group ``qwen2kit.backends`` and
run `qwen2kit.backend.conformance` against their own package.

Everything a backend needs of these is importable from here, the values of `qwen2kit.backend.values`
included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.processes import Processes
from qwen2kit.backend.slots import Slots
from qwen2kit.backend.values import (
    BackendInfo,
    Capabilities,
    Device,
    FinishReason,
    LoadReport,
    Score,
    ScoreRequest,
    StepMetrics,
    TokenBatch,
    TokenEvent,
    TokenIds,
)
from qwen2kit.spec.model import ModelSpec
from qwen2kit.weights.source import WeightSource
from qwen2kit.weights.tensor import HostTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "PROTOCOL_VERSION",
    "AdapterModel",
    "Backend",
    "BackendInfo",
    "Capabilities",
    "CompiledModel",
    "Device",
    "DistributedBackend",
    "FinishReason",
    "LoadReport",
    "ProfiledModel",
    "Saved",
    "Saving",
    "Score",
    "ScoreRequest",
    "StepMetrics",
    "TokenBatch",
    "TokenEvent",
    "TokenIds",
    "TrainableModel",
]

PROTOCOL_VERSION: Final = 3


class Saving(Protocol):
    """A checkpoint on its way to disk; training may go on meanwhile."""

    def done(self) -> bool:
        """Whether this process has nothing left to write (or failed)."""
        ...

    def wait(self) -> tuple[str, ...]:
        """Block until then; names of the files that this process wrote.

        Raises OSError if the disk is full or not writable.
        """
        ...


@dataclass(frozen=True, slots=True)
class Saved:
    """A `Saving` that was finished at once.

    Attributes:
        files: names of the files written.
    """

    files: tuple[str, ...]

    def done(self) -> bool:
        """True."""
        return True

    def wait(self) -> tuple[str, ...]:
        """The files."""
        return self.files


@runtime_checkable
class CompiledModel(Protocol):
    """A spec made runnable on one device.

    Attributes:
        spec: the model.
        limit: longest sequence in tokens, new ones included (`backend.limits.context_limit`).
    """

    spec: ModelSpec
    limit: int

    def load(self, weights: WeightSource) -> LoadReport:
        """Fill every parameter, strictly. Raises WeightError if names or shapes do not fit."""
        ...

    def export(self) -> Iterator[tuple[str, HostTensor]]:
        """All schema parameters in schema order, canonical names, dense, one at a time."""
        ...

    def logits(self, tokens: TokenIds) -> NDArray[np.float32]:
        """Logits ``[T, vocab]`` in float32 of one sequence, without any cache."""
        ...

    def hidden_states(self, tokens: TokenIds) -> NDArray[np.float32]:
        """Residual stream ``[layers + 2, T, hidden]`` float32: the embedding output, the output of
        every decoder layer, and the final norm's output. For diagnosis only."""
        ...

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        """Score requests in any order the backend likes; yields ``(index, score)`` as they finish.

        Raises BackendError if a request is longer than the model can take, has an empty side, or
        holds a token id outside the vocabulary.
        """
        ...

    def slots(self, count: int, capacity: int) -> Slots:
        """Room for up to ``count`` sequences of ``capacity`` tokens to be continued together;
        fewer than ``count`` where memory does not hold them.

        Raises BackendError if not even one fits, or ``capacity`` is beyond the model's limit.
        """
        ...


@runtime_checkable
class TrainableModel(CompiledModel, Protocol):
    """A compiled model that can be optimised (``plan.train`` must be set).

    With several processes every method is collective: all processes call it, in the same order.

    Attributes:
        data_shard: ``(rank, world)`` of this process among those that read different rows.
    """

    data_shard: tuple[int, int]

    def init(self, seed: int) -> None:
        """Fresh parameters by the schema's initialisers; the same values for the same seed on
        every backend and world size."""
        ...

    def train_step(self, batch: TokenBatch, lr: float, *, max_loss: float = inf) -> StepMetrics:
        """One AdamW step: micro-batches, global token-mean loss, clipping, update.

        A loss above ``max_loss`` skips the update, whatever the plan says of non-finite ones.
        """
        ...

    def loss(self, batch: TokenBatch) -> StepMetrics:
        """Mean loss of ``batch`` without updating anything (``grad_norm`` is 0)."""
        ...

    def save_state(self, directory: Path) -> Saving:
        """Write weights and optimizer state into an existing empty directory (safetensors).

        The state is that of the moment of the call, whatever training does afterwards.
        """
        ...

    def restore_state(self, directory: Path) -> None:
        """Read what `save_state` wrote, with any number of processes; afterwards training
        continues (bit-identically on an equal mesh).

        Raises WeightError if files are missing, truncated or of another model.
        """
        ...


@runtime_checkable
class AdapterModel(TrainableModel, Protocol):
    """A model that trains LoRA adapters (``plan.train.adapter``).

    `load` takes the frozen weights and starts the adapter anew; `save_state` writes the adapter
    alone; `export` gives the merged weights.
    """

    def export_adapter(self) -> Iterator[tuple[str, HostTensor]]:
        """A ``[rank, in]`` and B ``[out, rank]`` of every adapted matrix, float32, under the names
        of `qwen2kit.adapters.lora.factor_names`; collective."""
        ...


@runtime_checkable
class ProfiledModel(TrainableModel, Protocol):
    """A model that can say where the time of a step goes."""

    def profiler(self, directory: Path) -> AbstractContextManager[None]:
        """Record what happens inside the context; on leaving it, write a Chrome trace per process
        into ``directory`` (created if absent)."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A framework that can run specs."""

    name: str
    protocol_version: int

    def capabilities(self) -> Capabilities:
        """What this backend can do on this machine."""
        ...

    def devices(self) -> tuple[Device, ...]:
        """Usable devices, best first."""
        ...

    def versions(self) -> dict[str, str]:
        """Names and versions of the frameworks in use, for provenance."""
        ...

    def compile(self, spec: ModelSpec, plan: ExecutionPlan) -> CompiledModel:
        """Build the model without weights.

        Raises BackendError if spec or plan needs a capability this backend lacks.
        """
        ...


@runtime_checkable
class DistributedBackend(Backend, Protocol):
    """A backend that trains with several processes (``Capabilities.distributed``)."""

    def processes(self, plan: ExecutionPlan) -> Processes:
        """Join the other processes of this run, as the launcher's environment says; alone if it
        says nothing. Idempotent. To be called before `Backend.compile`."""
        ...

    def launch_command(self, processes: int, *, max_restarts: int = 0) -> list[str]:
        """Command line that starts ``processes`` processes on this machine; what each one runs
        (``-m module`` and arguments) is appended to it. If one process is lost, all are started
        again, at most ``max_restarts`` times. Its exit code is that of a process that failed,
        not that of one that only lost it (`PeerError`)."""
        ...

    def lost_process(self, error: Exception) -> bool:
        """Whether ``error`` means that another process of the run is gone, not that this one did
        anything wrong."""
        ...
