"""The seam of generation: key/value slots on a device, and forward passes over them.

A backend offers `Slots`; scheduling, drawing, prefix sharing and speculation are core's
(`qwen2kit.engine`). Shapes: N wanted positions, k shortlist, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qwen2kit.weights.tensor import HostTensor

BROKEN: Final = -1
"""In place of an id: the row of logits holds NaN or +inf, or nothing finite to choose from."""

ANCHORED_KEYS: Final = "anchored_keys"
"""The name, in place of ``keys``, of saved keys that stand less the unrotated bias of their
projection: attention is the same, but one sequence must not mix the two."""


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens for one slot.

    Attributes:
        slot: its number.
        start: positions of the slot that stay; ``tokens`` follow them, and whatever lay beyond is
            forgotten. This is how a slot is emptied (0), cut back or extended.
        tokens: at least one id.
        wanted: how many of the last positions' logits are wanted, 0 to ``len(tokens)``.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]
    wanted: int = 1


class Edit(NamedTuple):
    """What happens to one row of logits before a token is drawn from it, in this order.

    Attributes:
        limit: ids at or above it are out (untrained padding rows); None keeps all.
        ids: int64 ``[n]``, distinct ids whose logits change, or None.
        scale: float32 ``[n]``; a positive logit is divided by it, a negative one multiplied.
        shift: float32 ``[n]``, added afterwards.
        allowed: packed mask uint32 ``[ceil(V / 32)]``, bit ``i`` of word ``w`` stands for id
            ``32 * w + i``; ids without their bit are out. None allows all.
        temperature: divides the logits in `Shortlist.total`; 0 counts as 1.
    """

    limit: int | None = None
    ids: NDArray[np.int64] | None = None
    scale: NDArray[np.float32] | None = None
    shift: NDArray[np.float32] | None = None
    allowed: NDArray[np.uint32] | None = None
    temperature: float = 1.0


class Cut(NamedTuple):
    """What is kept of a row's softmax at `Edit.temperature`, and where it is cut.

    Attributes:
        top_k, top_p: as in `qwen2kit.generate.sampling.Sampling`.
        point: in [0, 1); of what is kept, by falling score, the token in whose share it falls.
    """

    top_k: int = 0
    top_p: float = 1.0
    point: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How all following tokens of one sequence are drawn.

    Attributes:
        limit, temperature: as in `Edit`.
        top_k, top_p: as in `Cut`.
        repetition_penalty, presence_penalty, frequency_penalty: as in
            `qwen2kit.generate.sampling.Sampling`.
        heard: ids that the repetition penalty counts though they were not drawn.
        said: how often ids were drawn.
        points: gives `Cut.point` of so many draws, from the n-th following one on: ``(n, count)``.
    """

    limit: int | None
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    heard: Sequence[int]
    said: Mapping[int, int]
    points: Callable[[int, int], list[float]]


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The most likely tokens of N rows, and what is needed to know what they leave out.

    Attributes:
        ids: int64 ``[N, k]``, by falling score; ids that are out may fill the end (score -inf).
        scores: float32 ``[N, k]``, edited logits.
        total: float64 ``[N]``, log-sum-exp of ``edited logits / temperature`` over the whole row,
            within 1e-4; so a device adds the row's maximum on in float64.
        raw: float32 ``[N, k]``, logits of ``ids`` before the edit.
        raw_total: float64 ``[N]``, log-sum-exp of the logits below ``limit`` before the edit.

    One of the totals of a broken row (see `BROKEN`) is not finite; its other values mean nothing.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    total: NDArray[np.float64]
    raw: NDArray[np.float32]
    raw_total: NDArray[np.float64]

    @classmethod
    def in_order(
        cls,
        ids: NDArray[Any],
        scores: NDArray[Any],
        total: NDArray[Any],
        raw: NDArray[Any],
        raw_total: NDArray[Any],
    ) -> Shortlist:
        """From the k most likely tokens of every row in any order; equals go by id."""
        import numpy as np

        order = np.lexsort((ids, -scores), axis=-1)
        ids, scores, raw = (np.take_along_axis(part, order, axis=-1) for part in (ids, scores, raw))
        return cls(
            ids=ids.astype(np.int64, copy=False),
            scores=scores.astype(np.float32, copy=False),
            total=total.astype(np.float64, copy=False),
            raw=raw.astype(np.float32, copy=False),
            raw_total=raw_total.astype(np.float64, copy=False),
        )

    @property
    def sound(self) -> list[bool]:
        """Whether each row can be drawn from."""
        import numpy as np

        found: list[bool] = (np.isfinite(self.total) & np.isfinite(self.raw_total)).tolist()
        return found


class Logits(Protocol):
    """Logits of the wanted positions, feed by feed, still on the device."""

    def greedy(self, limit: int | None) -> list[int]:
        """The most likely id below ``limit`` of each of the N rows, the smallest one of equals;
        `BROKEN` where there is none."""
        ...

    def shortlist(self, size: int, edits: Sequence[Edit]) -> Shortlist:
        """The ``size`` most likely ids of every row after its edit."""
        ...

    def rows(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Unedited float32 logits ``[len(rows), V]``."""
        ...


@runtime_checkable
class DrawingLogits(Logits, Protocol):
    """Logits of a device that draws from whole rows faster than they are copied to the host.

    Attributes:
        quick: whether it also does so faster than it gives a shortlist.
    """

    quick: bool

    def draw(self, rows: Sequence[int], edits: Sequence[Edit], cuts: Sequence[Cut]) -> list[int]:
        """Ids drawn from some rows, each after its edit (temperature 0 takes the most likely);
        equal scores by rising id, sums in float64. `BROKEN` where the row is."""
        ...


@runtime_checkable
class Slots(Protocol):
    """Keys and values of ``count`` independent sequences of up to ``capacity`` tokens.

    What a slot gives does not depend on other slots, nor on how its tokens were divided into
    feeds (up to rounding).
    """

    count: int
    capacity: int

    def feed(self, feeds: Sequence[Feed]) -> Logits:
        """Append tokens to slots, each slot at most once, in as few passes as the device likes.

        The caller sees to it that slots hold ``start`` positions and that everything fits.
        """
        ...

    def run_greedy(
        self, feeds: Sequence[Feed], limit: int | None, most: int | None = None
    ) -> Iterator[list[int]]:
        """Feed one token per slot, then go on with the most likely id below ``limit`` of each.

        Yields the ids of each step, one per feed, as the device finishes; it may run ahead of
        the reader. A row that is `BROKEN` goes on with any id: what it yields from then on means
        nothing. Ends when a slot is full, or after ``most`` steps, behind which nothing is
        computed; may be closed at any time. Afterwards a slot holds the fed token and those
        yielded before the last one; what lies beyond is undefined.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first ``length`` positions of ``target`` equal to those of ``source``."""
        ...

    def clear(self, slot: int) -> None:
        """Empty a slot whose keys and values may be NaN, so that nothing of it is felt by what
        comes next."""
        ...

    def close(self) -> None:
        """Give the memory back; idempotent. Nothing else may be called afterwards."""
        ...


@runtime_checkable
class DrawingSlots(Slots, Protocol):
    """Slots of a device that draws tokens by itself."""

    def run_drawn(
        self, feeds: Sequence[Feed], courses: Sequence[Course], most: int | None = None
    ) -> Iterator[list[int]]:
        """As `run_greedy`, with tokens drawn by ``courses``, one for each feed."""
        ...


@runtime_checkable
class PreparedSlots(Slots, Protocol):
    """Slots of a device for which passes are compiled when they are first needed."""

    def prepare(self) -> None:
        """Compile them all now, before anything is held."""
        ...


@runtime_checkable
class PersistentSlots(Slots, Protocol):
    """Slots whose content can leave the device and come back (a prompt cache on disk)."""

    def export(self, slot: int, length: int) -> Iterator[tuple[str, HostTensor]]:
        """Keys and values of the first ``length`` positions: ``layers.{i}.keys`` (or
        `ANCHORED_KEYS`) and ``layers.{i}.values``, each ``[kv_heads, length, head_dim]`` in the
        cache's dtype; a quantised cache has packed integers there, and parts like
        ``layers.{i}.keys.scales``."""
        ...

    def restore(self, slot: int, tensors: Iterator[tuple[str, HostTensor]]) -> None:
        """Fill a slot from what `export` gave; raises WeightError if it does not fit."""
        ...
