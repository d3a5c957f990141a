"""Traces of a few steps of a run, as its recipe wants them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from qwen2kit.backend.protocol import ProfiledModel, TrainableModel
from qwen2kit.errors import BackendError


class StepProfiler:
    """Switches the model's profiler on and off at the right steps.

    Args:
        directory: where the traces go.
        steps: first and last step to record; None records nothing.

    Raises:
        BackendError: steps are to be recorded and the model cannot.
    """

    def __init__(
        self, model: TrainableModel, directory: Path, steps: tuple[int, int] | None
    ) -> None:
        self._stack = ExitStack()
        self._active = False
        self._directory = directory
        self._first, self._last = steps or (0, 0)
        self._model: ProfiledModel | None = None
        if steps is not None:
            if not isinstance(model, ProfiledModel):
                raise BackendError("this backend has no profiler; remove logging.profile_steps")
            self._model = model

    def starting(self, step: int) -> None:
        """Step number ``step`` comes next."""
        if self._active and not self._first <= step <= self._last:
            self.close()
        elif self._model is not None and step == self._first and not self._active:
            self._stack.enter_context(self._model.profiler(self._directory))
            self._active = True

    def close(self) -> None:
        """Write what has been recorded, if anything has."""
        self._stack.close()
        self._active = False
