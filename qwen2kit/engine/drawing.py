"""Drawing the tokens of one step: every request by its own rules, drafts checked on the way.

A request with ``k`` drafted tokens has ``k + 1`` rows of logits. Its sampler draws from one after
the other for as long as the draws are the drafted tokens; what it draws is therefore what it would
have drawn without a draft.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from qwen2kit.backend.slots import BROKEN, DrawingLogits, Edit, Logits, Shortlist
from qwen2kit.engine.sequence import Sequence
from qwen2kit.errors import NonFiniteLogits
from qwen2kit.generate.edit import only_allowed
from qwen2kit.generate.inverse_cdf import Head, heads_of
from qwen2kit.generate.sampling import Drawn, Sampler

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Block(NamedTuple):
    """Rows of one sequence: that of its last token and those of the draft after it."""

    sequence: Sequence
    draft: tuple[int, ...] = ()


def draw(logits: Logits, blocks: Many[Block]) -> list[list[Drawn]]:
    """Tokens of every block: the draft as far as it was right, and one more, which is `BROKEN`
    where its logits are.

    Args:
        logits: rows of the blocks, one after the other.
        blocks: at least one.
    """
    limits = {block.sequence.request.sampling.vocab_limit for block in blocks}
    if len(limits) == 1 and all(block.sequence.plain for block in blocks):
        return _greedy(logits.greedy(limits.pop()), blocks)
    if all(not block.draft and block.sequence.request.constraint is None for block in blocks):
        found = draw_rows(logits, [block.sequence.sampler for block in blocks])
        return [[drawn] for drawn in found]
    walks, row = [], 0
    for block in blocks:
        walks.append(_Walk(block, row))
        row += len(block.draft) + 1
    if _draws(logits) and logits.quick and all(walk.foreseen for walk in walks):
        return _by_the_device(logits, walks)
    size = max(block.sequence.request.sampling.shortlist_size for block in blocks)
    shortlist = logits.shortlist(size, [edit for walk in walks for edit in walk.edits])
    heads = _heads(shortlist, [walk.sampler for walk in walks for _ in walk.edits])
    going = walks
    while going:
        stuck = [walk for walk in going if not walk.follow(shortlist, heads)]
        found = _from_whole_rows(logits, [(w.row, w.sampler, w.edit) for w in stuck])
        for walk, drawn in zip(stuck, found, strict=True):
            walk.add(drawn)
        going = [walk for walk in stuck if not walk.done]
    return [walk.drawn for walk in walks]


def draw_rows(logits: Logits, samplers: Many[Sampler]) -> list[Drawn]:
    """One token per row, each by its own sampler; `BROKEN` where the logits are."""
    edits = [sampler.edit() for sampler in samplers]
    reports = any(sampler.sampling.reports for sampler in samplers)
    if _draws(logits) and logits.quick and not reports:
        return _from_whole_rows(logits, list(zip(count(), samplers, edits, strict=False)))
    size = max(sampler.sampling.shortlist_size for sampler in samplers)
    shortlist = logits.shortlist(size, edits)
    heads = _heads(shortlist, samplers)
    found = [
        _short(sampler, shortlist, head, row, edit)
        for row, (sampler, head, edit) in enumerate(zip(samplers, heads, edits, strict=True))
    ]
    stuck = [row for row, drawn in enumerate(found) if drawn is None]
    late = _from_whole_rows(logits, [(row, samplers[row], edits[row]) for row in stuck])
    for row, drawn in zip(stuck, late, strict=True):
        found[row] = drawn
    return [drawn for drawn in found if drawn is not None]


def _draws(logits: Logits) -> TypeGuard[DrawingLogits]:
    """`isinstance` of a protocol would look for every method at every step."""
    return hasattr(logits, "quick")


def _greedy(best: list[int], blocks: Many[Block]) -> list[list[Drawn]]:
    found, row = [], 0
    for block in blocks:
        drawn = [Drawn(best[row])]
        for place, token in enumerate(block.draft, 1):
            if drawn[-1].token != token:
                break
            drawn.append(Drawn(best[row + place]))
        found.append(drawn)
        row += len(block.draft) + 1
    return found


def _by_the_device(logits: DrawingLogits, walks: Many[_Walk]) -> list[list[Drawn]]:
    """Every row drawn as if the draft before it were right."""
    edits = [edit for walk in walks for edit in walk.edits]
    cuts = [walk.sampler.cut(ahead) for walk in walks for ahead in range(len(walk.edits))]
    tokens = logits.draw(range(len(edits)), edits, cuts)
    for walk in walks:
        while not walk.done:
            walk.take(tokens[walk.row])
    return [walk.drawn for walk in walks]


def _heads(shortlist: Shortlist, samplers: Many[Sampler]) -> list[Head | None]:
    """The heads of all rows; None for broken ones."""
    heads = heads_of(shortlist, [sampler.sampling for sampler in samplers])
    return [head if sound else None for head, sound in zip(heads, shortlist.sound, strict=True)]


def _short(
    sampler: Sampler, shortlist: Shortlist, head: Head | None, row: int, edit: Edit
) -> Drawn | None:
    return Drawn(BROKEN) if head is None else sampler.draw_short(shortlist, head, row, edit)


def _from_whole_rows(logits: Logits, stuck: Many[tuple[int, Sampler, Edit]]) -> list[Drawn]:
    """One token for each row, sampler and edit that a shortlist was not enough for."""
    if not stuck:
        return []
    rows = [row for row, _, _ in stuck]
    reports = any(sampler.sampling.reports for _, sampler, _ in stuck)
    if _draws(logits) and not reports:
        cuts = [sampler.cut() for _, sampler, _ in stuck]
        tokens = logits.draw(rows, [edit for _, _, edit in stuck], cuts)
        return [
            _taken(sampler, token) for token, (_, sampler, _) in zip(tokens, stuck, strict=True)
        ]
    whole = zip(stuck, logits.rows(rows), strict=True)
    return [_whole(sampler, logits_V, edit) for (_, sampler, edit), logits_V in whole]


def _taken(sampler: Sampler, token: int) -> Drawn:
    """``token`` as the sampler's next draw."""
    if token != BROKEN:
        sampler.accept(token)
    return Drawn(token)


def _whole(sampler: Sampler, logits_V: NDArray[np.float32], edit: Edit) -> Drawn:
    try:
        return sampler.draw(logits_V, edit)
    except NonFiniteLogits:
        return Drawn(BROKEN)


class _Walk:
    """One block while it is drawn.

    Attributes:
        edits: of its rows. Where a constraint must see the draws before it can tell, only the
            first one is final.
        drawn: so far.
        done: whether nothing more is to be drawn.
        edit: of the next draw.
        sampler: draws.
    """

    def __init__(self, block: Block, first: int) -> None:
        self.drawn: list[Drawn] = []
        self.done = False
        self.sampler = block.sequence.sampler
        self._draft = block.draft
        self._first = first
        self._request = block.sequence.request
        self.edits: list[Edit] = self.sampler.edits(block.draft)
        if self._request.constraint is not None:
            self.edits[0] = self.sampler.edit(self._request.constraint.mask())
        self.edit = self.edits[0]

    @property
    def row(self) -> int:
        """That of the next draw."""
        return self._first + len(self.drawn)

    @property
    def foreseen(self) -> bool:
        """Whether all its rows' edits are final, and ids are all that is wanted."""
        late = self._draft and self._request.constraint is not None
        return not (late or self._request.sampling.reports)

    def take(self, token: int) -> None:
        """Go on after ``token``, which the device has drawn."""
        self.add(_taken(self.sampler, token))

    def follow(self, shortlist: Shortlist, heads: list[Head | None]) -> bool:
        """Draw as long as the shortlist tells; whether that was to the end."""
        while not self.done:
            late = self.drawn and self._request.constraint is not None
            row = self.row
            drawn = (
                self._forced()
                if late
                else _short(self.sampler, shortlist, heads[row], row, self.edit)
            )
            if drawn is None:
                return False
            self.add(drawn)
        return True

    def add(self, drawn: Drawn) -> None:
        """Go on after ``drawn``."""
        place = len(self.drawn)
        self.drawn.append(drawn)
        token, constraint = drawn.token, self._request.constraint
        self.done = place == len(self._draft) or self._draft[place] != token
        if token == BROKEN or token in self._request.sampling.stop_token_ids:
            self.done = True
        elif constraint is not None:
            constraint.accept(token)
            self.done |= constraint.finished
        if self.done:
            return
        self.edit = self.edits[place + 1]
        if constraint is not None:
            self.edit = self.sampler.edit(constraint.mask())

    def _forced(self) -> Drawn | None:
        """The only token the constraint allows, if there is one and nothing else is asked."""
        allowed = self.edit.allowed
        token = None if allowed is None else only_allowed(allowed)
        if token is None or self._request.sampling.reports:
            return None
        self.sampler.accept(token)
        return Drawn(token)
