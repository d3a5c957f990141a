"""What is compared: our backends, and other implementations ("peers") behind one interface.

Peers are found through the entry-point group ``qwen2kit.peers``; an entry loads to a `PeerLoader`.
Core imports none of them before it is asked to run one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from qwen2kit.backend.entries import entries, entry
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.registry import GROUP as BACKENDS
from qwen2kit.backend.registry import get
from qwen2kit.backend.values import TokenIds
from qwen2kit.engine.generate import generate
from qwen2kit.errors import ConfigError, Qwen2KitError
from qwen2kit.generate.sampling import Sampling
from qwen2kit.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GROUP = "qwen2kit.peers"


@runtime_checkable
class Peer(Protocol):
    """A loaded model of any implementation."""

    name: str

    def logits(self, tokens: TokenIds) -> NDArray[np.float32]:
        """Logits ``[T, vocab]`` float32, computed without a cache."""
        ...

    def greedy(self, tokens: TokenIds, count: int, stop: Sequence[int]) -> list[int]:
        """Up to ``count`` greedy tokens through the implementation's own cached decoding; the
        first id of ``stop`` is included and ends it."""
        ...

    def hidden_states(self, tokens: TokenIds) -> NDArray[np.float32] | None:
        """Residual stream ``[layers + 2, T, hidden]`` as in `CompiledModel`, or None if the
        implementation does not show it."""
        ...


class PeerLoader(Protocol):
    """Makes a `Peer` out of a checkpoint."""

    name: str

    def refuses(self, checkpoint: Checkpoint, dtype: str) -> str:
        """Why this peer cannot take part (not installed, cannot read the format), or ``""``."""
        ...

    def load(self, checkpoint: Checkpoint, dtype: str) -> Peer:
        """Load the checkpoint's own files with the peer's own loader, in ``dtype``."""
        ...


class BackendPeer:
    """One of our backends as a `PeerLoader`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refuses(self, checkpoint: Checkpoint, dtype: str) -> str:
        """Missing framework, or a dtype the backend does not compute in."""
        try:
            capabilities = get(self.name).capabilities()
        except Qwen2KitError as error:
            return str(error)
        if dtype not in capabilities.dtypes:
            return f"computes in {', '.join(capabilities.dtypes)}, not {dtype}"
        return ""

    def load(self, checkpoint: Checkpoint, dtype: str) -> Peer:
        """Compile the spec and stream the weights in. Raises BackendError, WeightError."""
        model = get(self.name).compile(checkpoint.spec, ExecutionPlan(dtype=dtype))
        model.load(checkpoint.weights)
        return _Compiled(self.name, model)


@dataclass(frozen=True, slots=True)
class Choice:
    """Who takes part in a comparison, and who does not and why."""

    loaders: tuple[PeerLoader, ...]
    not_applicable: dict[str, str]


def choose(
    checkpoint: Checkpoint, *, backends: Sequence[str], peers: Sequence[str] | None, dtype: str
) -> Choice:
    """Select implementations for ``checkpoint``.

    Args:
        backends: names of our backends.
        peers: names of peers, or None for every registered one.

    Raises:
        BackendError: a name is not registered.
        ConfigError: a backend or peer that was asked for by name twice.
    """
    names = sorted(entries(GROUP)) if peers is None else list(peers)
    if len({*backends, *names}) != len(backends) + len(names):
        raise ConfigError("an implementation is named twice; give each one once")
    found = {name: entry(GROUP, "peer", name) for name in names}
    for name in backends:
        entry(BACKENDS, "backend", name)
    loaders: list[PeerLoader] = [BackendPeer(name) for name in backends]
    refused: dict[str, str] = {}
    for name, peer in found.items():
        if checkpoint.adapter is not None:
            refused[name] = "reads whole models; merge the adapter first: qwen2kit convert"
            continue
        try:
            loaders.append(peer.load()())
        except ImportError as error:
            refused[name] = f"cannot be imported: {error}"
    reasons = {loader.name: loader.refuses(checkpoint, dtype) for loader in loaders}
    refused |= {name: reason for name, reason in reasons.items() if reason}
    return Choice(tuple(loader for loader in loaders if not reasons[loader.name]), refused)


class _Compiled:
    """Adapts a CompiledModel to `Peer`."""

    def __init__(self, name: str, model: CompiledModel) -> None:
        self.name = name
        self._model = model

    def logits(self, tokens: TokenIds) -> NDArray[np.float32]:
        return self._model.logits(tokens)

    def greedy(self, tokens: TokenIds, count: int, stop: Sequence[int]) -> list[int]:
        sampling = Sampling(max_new_tokens=count, stop_token_ids=tuple(stop))
        return [event.token for event in generate(self._model, [tokens], sampling)]

    def hidden_states(self, tokens: TokenIds) -> NDArray[np.float32] | None:
        return self._model.hidden_states(tokens)
