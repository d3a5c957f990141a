"""One request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2kit.engine.request import Request
from qwen2kit.generate.sampling import Sampler


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and how far it has come.

    Attributes:
        key: what the engine calls it.
        request: what was asked.
        tokens: prompt, then everything drawn.
        left: tokens it may still produce.
        sampler: draws its tokens.
        plain: whether its next token is a bare argmax.
        slot: where its keys and values are, once admitted.
        fed: positions of the slot that hold ``tokens``; the last drawn token is not fed until
            another one is wanted.
        ended: when it left its slot (steps of the engine); None while it has not.
    """

    key: int
    request: Request
    tokens: list[int]
    left: int
    sampler: Sampler
    plain: bool
    slot: int = -1
    fed: int = 0
    ended: int | None = None

    @property
    def unfed(self) -> int:
        """Tokens that await feeding: 1 between two draws, more while the prompt is read."""
        return len(self.tokens) - self.fed

    @property
    def foreseen(self) -> bool:
        """Whether a device that draws by itself needs to know no more than the tokens."""
        sampling = self.request.sampling
        return self.request.constraint is None and not (sampling.reports or sampling.logit_bias)


def start(key: int, request: Request, capacity: int) -> Sequence:
    """A sequence that has not begun; a prompt that fills the capacity still gets one token."""
    room = max(1, capacity - len(request.prompt))
    return Sequence(
        key,
        request,
        list(request.prompt),
        min(request.sampling.max_new_tokens, room),
        Sampler(request.sampling, request.prompt, request.stream),
        request.sampling.is_plain_greedy and request.constraint is None,
    )
