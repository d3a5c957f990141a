"""What one server takes on, so that no client can exhaust it."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2kit.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on requests.

    Attributes:
        slots: sequences computed together.
        queue: further sequences that may wait; beyond them requests get 429.
        max_tokens: most generated tokens per choice; None is bounded by the context alone.
        max_choices: most sequences of one request (``n``, times the number of prompts).
        max_body: longest request body in bytes.
        max_pending: events a stream may lag behind before it is cut off.
        grace: seconds that running requests get after SIGTERM.
        stall: seconds after which a step that has not ended counts as a failure of the engine.

    Raises:
        ConfigError: a value is not positive.
    """

    slots: int = 16
    queue: int = 64
    max_tokens: int | None = None
    max_choices: int = 16
    max_body: int = 8 << 20
    max_pending: int = 4096
    grace: float = 30.0
    stall: float = 300.0

    def __post_init__(self) -> None:
        for name in ("slots", "max_tokens", "max_choices", "max_body", "max_pending"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("queue", "grace", "stall"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
