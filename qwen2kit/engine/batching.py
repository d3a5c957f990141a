"""One pass over everything that runs: who is fed what, and who draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qwen2kit.backend.slots import Feed
from qwen2kit.engine.drawing import Block
from qwen2kit.engine.sequence import Sequence


def compose(
    running: Iterable[Sequence], drafts: Mapping[int, tuple[int, ...]], budget: int
) -> tuple[list[Feed], list[Block]]:
    """Feeds of one pass; everything fed, drafts aside, counts as fed from now on.

    A sequence between two draws gets its last token and its draft. The others read their prompts
    in pieces, the oldest first, ``budget`` tokens altogether, so that no prompt holds up those
    that speak.

    Returns:
        The feeds, and a block for every sequence that draws, in the order of their rows.
    """
    feeds, blocks = [], []
    for sequence in running:
        count = sequence.unfed
        if count > 1:
            count = min(count, budget)
            budget -= count
        if count == 0:
            continue
        draft = drafts.get(sequence.key, ())
        end = sequence.fed + count
        tokens = (*sequence.tokens[sequence.fed : end], *draft)
        done = end == len(sequence.tokens)
        feeds.append(Feed(sequence.slot, sequence.fed, tokens, len(draft) + 1 if done else 0))
        sequence.fed = end
        if done:
            blocks.append(Block(sequence, draft))
    return feeds, blocks
