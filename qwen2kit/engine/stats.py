"""What an engine has done so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made.

    Attributes:
        prompt_tokens: of admitted requests.
        cached_tokens: those of them that were found in a slot and not computed again.
        generated_tokens: drawn and handed out.
        drafted: tokens proposed by the drafter.
        accepted: those of them that were drawn.
        steps: calls of `Engine.step` that reached the model.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
