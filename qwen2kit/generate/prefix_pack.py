"""Many steps of a prefix tree in one forward pass.

`plan_scores` walks the tree leaf by leaf, which leaves a GPU idle when leaves are short. A pack is
several consecutive steps laid end to end: a token sees the tokens of its own path only, some of
them in the cache (the trunk), some in earlier runs of the same pack. The mask follows from how
much of the path before it each step keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2kit.generate.prefix import ScoreStep, Target


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass over T tokens after a trunk of cached ones.

    Attributes:
        kept: int64, slots of the pack before (its trunk, then its tokens) that are this trunk.
        tokens: int64 ``[T]``.
        positions: int64 ``[T]``, place of each token on its path.
        runs: int64 ``[T]``, which step each token comes from; steps are numbered from 0.
        links: int64 ``[runs]``, tokens that each step keeps of the path of the step before.
        targets: what to read from the logits of the fed positions.
    """

    kept: NDArray[np.int64]
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    runs: NDArray[np.int64]
    links: NDArray[np.int64]
    targets: tuple[Target, ...]

    @property
    def is_plain(self) -> bool:
        """Whether this is one run, for which a causal mask does."""
        return len(self.links) == 1

    def visible(self, window: int | None = None) -> NDArray[np.bool_]:
        """What each token may attend to: bool ``[T, trunk + T]``.

        Args:
            window: sliding-window length in tokens; None for full attention.
        """
        limits = _limits(self.links)
        trunk = np.arange(len(self.kept))
        shared = np.minimum.accumulate(self.links)[self.runs]
        before = trunk < shared[:, None]
        own = self.positions < limits[:, self.runs].T[:, self.runs]
        own |= (self.runs == self.runs[:, None]) & (self.positions <= self.positions[:, None])
        seen = np.concatenate([before, own], axis=1)
        if window is not None:
            places = np.concatenate([trunk, self.positions])
            seen &= self.positions[:, None] - places < window
        return seen

    def path(self, link: int) -> NDArray[np.int64]:
        """Slots of the first ``link`` tokens on the path of the last run, in order."""
        limits = np.minimum(_limits(self.links)[:, -1], link)
        limits[-1] = link
        trunk = np.arange(min(int(self.links.min()), link))
        own = np.flatnonzero(self.positions < limits[self.runs])
        found = np.concatenate([trunk, len(self.kept) + own])
        order = np.argsort(np.concatenate([trunk, self.positions[own]]), kind="stable")
        return found[order]


def pack_steps(steps: Iterable[ScoreStep], budget: int) -> Iterator[Pack]:
    """``steps`` in packs of at most ``budget`` tokens; a longer step is a pack of its own."""
    last: Pack | None = None
    group: list[ScoreStep] = []
    size = 0
    for step in steps:
        if group and size + len(step.feed) > budget:
            last = _pack(group, last)
            yield last
            group, size = [], 0
        group.append(step)
        size += len(step.feed)
    if group:
        yield _pack(group, last)


def _pack(group: list[ScoreStep], last: Pack | None) -> Pack:
    lengths = [len(step.feed) for step in group]
    starts = np.cumsum([0, *lengths[:-1]])
    return Pack(
        kept=np.arange(0) if last is None else last.path(group[0].keep),
        tokens=np.concatenate([step.feed for step in group]).astype(np.int64),
        positions=np.concatenate([np.arange(s.keep, s.keep + len(s.feed)) for s in group]),
        runs=np.repeat(np.arange(len(group)), lengths),
        links=np.array([step.keep for step in group]),
        targets=tuple(
            Target(target.request, int(start) + target.first, target.tokens)
            for step, start in zip(group, starts, strict=True)
            for target in step.targets
        ),
    )


def _limits(links: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[k, i]``: positions of run ``k`` below it are on the path of run ``i``; 0 for ``k >= i``.

    That is the least that any step after ``k``, up to ``i``, keeps of the path before it.
    """
    count = len(links)
    limits = np.zeros((count, count), dtype=np.int64)
    for first in range(count - 1):
        limits[first, first + 1 :] = np.minimum.accumulate(links[first + 1 :])
    return limits
