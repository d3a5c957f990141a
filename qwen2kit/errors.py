"""The exceptions a user can cause. Each carries one line that says what to do next.

The CLI prints ``str(error)`` and exits with ``error.exit_code``; nothing here is ever shown as a
traceback. Bugs stay ordinary exceptions.
"""

from __future__ import annotations


class Qwen2KitError(ValueError):
    """Base of every error that has a remedy the user can apply."""

    exit_code = 1


class ConfigError(Qwen2KitError):
    """A model config, recipe or command-line value is wrong; the message names the field."""

    exit_code = 2


class WeightError(Qwen2KitError):
    """A weight file is missing, truncated, mislabelled or does not fit the model spec."""

    exit_code = 3


class TokenizerError(Qwen2KitError):
    """Tokenizer files are missing or inconsistent, or a chat template cannot be rendered."""

    exit_code = 4


class DataError(Qwen2KitError):
    """Training or evaluation data is missing or malformed; the message names file and row."""

    exit_code = 5


class TrainingError(Qwen2KitError):
    """Training cannot go on (NaN loss, full disk, checkpoint that does not fit the recipe)."""

    exit_code = 6


class PeerError(TrainingError):
    """Another process of this run has failed or is gone. That process says why, so the command
    line prints nothing for this error and only exits with its code, the lowest of all: launchers
    report the highest."""

    exit_code = 1


class ParityError(Qwen2KitError):
    """Two implementations disagree by more than the tolerance that was asked for."""

    exit_code = 7


class BackendError(Qwen2KitError):
    """A backend is unknown, too old for the protocol, or cannot do what was asked."""

    exit_code = 8


class NonFiniteLogits(BackendError):
    """A model's logits hold NaN, or nothing finite to choose from."""

    def __init__(self) -> None:
        super().__init__("the model produced NaN or infinite logits; use dtype bfloat16 or float32")


class MissingExtra(BackendError):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, missing: str) -> None:
        super().__init__(
            f"{missing!r} is not installed; install it with: pip install 'qwen2kit[{extra}]'"
        )
        self.extra = extra
