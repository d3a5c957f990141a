"""The end of a step that draws its own next tokens, penalties and all.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2kit.backend.slots import Course, Cut, Edit
from qwen2kit_torch.engine.draws import Draws, Scratch
from qwen2kit_torch.engine.kernels import draws as kernels
from qwen2kit_torch.engine.sending import send, sent

_MOST_TIMES = 16_000


class DrawTail:
    """Buffers and launches for R rows.

    Args:
        count: R.
        vocab: V.
        scratch: for R rows at least; shared with tails that do not run at the same time.
        step: int32 ``[1]``, number of the step, from 1 on.
        steps: for how many steps points are set at a time.
    """

    def __init__(self, count: int, vocab: int, scratch: Scratch, step: Tensor, steps: int) -> None:
        self._count, self._vocab, self._steps = count, vocab, steps
        self._draws = Draws(count, vocab, step.device, scratch=scratch, steps=steps)
        self._draws.step = step
        self._said = scratch.said[:count]
        self._penalties = torch.zeros(count, 3, dtype=torch.float64, device=step.device)
        self.set(())
        self.set_points(0)

    def set(self, courses: Sequence[Course]) -> None:
        """What the following steps draw by, row by row; rows beyond them draw anything."""
        self._courses = courses
        edits = [Edit(limit=each.limit, temperature=each.temperature) for each in courses]
        self._draws.set(edits, [Cut(each.top_k, each.top_p) for each in courses])
        penalties = [
            [each.repetition_penalty, each.presence_penalty, each.frequency_penalty]
            for each in courses
        ]
        rest = [[1.0, 0.0, 0.0]] * (self._count - len(courses))
        send(np.array(penalties + rest), self._penalties)
        self._said.zero_()
        for places, values in _told(courses, self._vocab):
            where, what = sent(np.stack([places, values]), self._said.device)
            self._said.view(-1)[where] = what.short()

    def set_points(self, first: int, most: int | None = None) -> None:
        """Points of the draws from the ``first``-th on, for as many steps as there is room, or
        the first ``most`` of them."""
        points = np.zeros((self._count, self._steps))
        count = self._steps if most is None else min(self._steps, most)
        for row, course in enumerate(self._courses):
            if course.temperature > 0:
                points[row, :count] = course.points(first, count)
        send(points, self._draws.points)

    def run(self, logits: Tensor, rows: Tensor, history: Tensor) -> None:
        """Launch: ids drawn from ``logits`` ``[R, V]`` go into ``rows`` (see `Step`), positions
        grow, and ``history`` keeps the ids."""
        token, slot, position = rows
        self._draws.run(logits, counts=True, said=self._said, penalties=self._penalties)
        kernels.advance[(self._count,)](
            self._draws.drawn, slot, position, token, history, self._draws.step, self._said,
            self._count, self._steps, self._vocab,
        )  # fmt: skip


Told = tuple[NDArray[np.int64], NDArray[np.int64]]


def _told(courses: Sequence[Course], vocab: int) -> list[Told]:
    """Places in ``said`` ``[R * V]`` that are not 0, and what they hold: what was heard, and after
    it what was said."""
    heard: list[NDArray[np.int64]] = []
    said: list[NDArray[np.int64]] = []
    times: list[NDArray[np.int64]] = []
    for row, course in enumerate(courses):
        if course.heard:
            heard.append(np.fromiter(course.heard, np.int64) + row * vocab)
        if course.said:
            said.append(np.fromiter(course.said.keys(), np.int64) + row * vocab)
            times.append(np.fromiter(course.said.values(), np.int64))
    found = []
    if heard:
        places = np.concatenate(heard)
        found.append((places, np.ones_like(places)))
    if said:
        counts = np.minimum(np.concatenate(times), _MOST_TIMES)
        found.append((np.concatenate(said), 1 + 2 * counts))
    return found
