"""Many steps of a prefix tree in one forward pass.

`plan_scores` walks the tree leaf by leaf, which leaves a GPU idle when leaves are short. A pack is
several consecutive steps (runs) laid end to end: a token sees the tokens of its own path only, some
of them in the cache (the trunk), some in earlier runs of the same pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.values import Score
from qwen2kit.generate.prefix import ScoreStep, Target


@dataclass(frozen=True, slots=True)
class Lookups:
    """What is to be read from the logits of a pack: M tokens in N rows.

    Attributes:
        positions: int64 ``[N]``, ascending: the fed positions whose logits are needed.
        rows: int64 ``[M]``, indices into ``positions``.
        tokens: int64 ``[M]``.
    """

    positions: NDArray[np.int64]
    rows: NDArray[np.intp]
    tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass over T tokens after a trunk of cached ones.

    Slots number the trunk's tokens, then the T tokens.

    Attributes:
        kept: int64, slots of the pack before that are this trunk.
        tokens: int64 ``[T]``.
        positions: int64 ``[T]``, place of each token on its path.
        starts: int64 ``[runs + 1]``, where each run begins among the T tokens; the last is T.
        paths: per run, int64: the slots of its whole path, its own tokens included.
        targets: what to read from the logits of the fed positions.
    """

    kept: NDArray[np.int64]
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    starts: NDArray[np.int64]
    paths: tuple[NDArray[np.int64], ...]
    targets: tuple[Target, ...]

    @property
    def is_plain(self) -> bool:
        """Whether this is one run, for which a causal mask does."""
        return len(self.paths) == 1

    def lookups(self) -> Lookups:
        """The tokens of all targets, one target after the other."""
        wanted = [np.arange(t.first, t.first + len(t.tokens)) for t in self.targets]
        positions, rows = np.unique(np.concatenate(wanted), return_inverse=True)
        tokens = np.array([token for target in self.targets for token in target.tokens])
        return Lookups(positions, rows, tokens)

    def scores(
        self, logprobs: NDArray[np.float64], best: NDArray[np.bool_]
    ) -> Iterator[tuple[int, Score]]:
        """Each target's request and score.

        Args:
            logprobs: ``[M]``, of the tokens of `lookups`.
            best: ``[M]``, whether the token is the most likely one.
        """
        starts = np.cumsum([0, *(len(target.tokens) for target in self.targets[:-1])])
        totals = np.add.reduceat(logprobs, starts).tolist()
        greedy = np.logical_and.reduceat(best, starts).tolist()
        for target, total, is_greedy in zip(self.targets, totals, greedy, strict=True):
            yield target.request, Score(total, is_greedy)

    def visible(self, window: int | None = None) -> NDArray[np.bool_]:
        """What each token may attend to: bool ``[T, trunk + T]``.

        Args:
            window: sliding-window length in tokens; None for full attention.
        """
        trunk, length = len(self.kept), len(self.tokens)
        seen = np.zeros((length, trunk + length), dtype=np.bool_)
        for start, end, path in zip(self.starts, self.starts[1:], self.paths, strict=False):
            seen[start:end, path[: len(path) - (end - start)]] = True
            seen[start:end, trunk + start : trunk + end] = np.tri(end - start, dtype=np.bool_)
        if window is not None:
            places = np.concatenate([np.arange(trunk), self.positions])
            seen &= self.positions[:, None] - places < window
        return seen


def pack_steps(steps: Iterable[ScoreStep], budget: int, keys: int | None = None) -> Iterator[Pack]:
    """``steps`` in packs of at most ``budget`` tokens, whose paths together have at most ``keys``
    tokens; a longer step is a pack of its own."""
    last: Pack | None = None
    group: list[ScoreStep] = []
    size = reach = 0
    for step in steps:
        fed = len(step.feed)
        size, reach = size + fed, reach + step.keep + fed
        if group and (size > budget or (keys is not None and reach > keys)):
            last = _pack(group, last)
            yield last
            group, size, reach = [], fed, step.keep + fed
        group.append(step)
    if group:
        yield _pack(group, last)


def _pack(group: list[ScoreStep], last: Pack | None) -> Pack:
    kept = np.arange(0) if last is None else last.paths[-1][: group[0].keep]
    starts = np.cumsum([0, *(len(step.feed) for step in group)])
    slots = np.arange(len(kept), len(kept) + starts[-1])
    path, paths = np.arange(len(kept)), []
    for step, start, end in zip(group, starts, starts[1:], strict=False):
        path = np.concatenate([path[: step.keep], slots[start:end]])
        paths.append(path)
    return Pack(
        kept=kept,
        tokens=np.concatenate([step.feed for step in group]).astype(np.int64),
        positions=np.concatenate([np.arange(s.keep, s.keep + len(s.feed)) for s in group]),
        starts=starts,
        paths=tuple(paths),
        targets=tuple(
            Target(target.request, int(start) + target.first, target.tokens)
            for step, start in zip(group, starts, strict=False)
            for target in step.targets
        ),
    )
