"""What can be asked of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qwen2kit.generate.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Constraint(Protocol):
    """Which tokens may come next in one sequence (a grammar in progress)."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow; the request then ends with ``stop``."""
        ...

    def mask(self) -> NDArray[np.uint32] | None:
        """Tokens allowed next, packed as `qwen2kit.backend.slots.Edit.allowed`; None allows all.
        At least one is allowed unless `finished`."""
        ...

    def accept(self, token: int) -> None:
        """Go on with ``token``, which the last mask allowed; not called for stop ids."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be continued.

    Attributes:
        prompt: token ids.
        sampling: how to choose tokens and when to stop.
        stream: separates the random streams of requests that share a seed.
        constraint: what the tokens must follow, for this request alone; None is anything.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    stream: int = 0
    constraint: Constraint | None = None
