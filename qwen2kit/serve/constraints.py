"""The grammars that requests ask for, and keeping their failures within the request."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from qwen2kit.engine.constraint import ConstraintCompiler
from qwen2kit.engine.jump_ahead import ForcingConstraint
from qwen2kit.engine.request import Constraint
from qwen2kit.errors import Qwen2KitError
from qwen2kit.serve.chat_request import ChatRequest
from qwen2kit.serve.errors import invalid
from qwen2kit.serve.fields import GenerationFields, JsonSchemaFormat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qwen2kit.backend.loading import LoadedModel


class RequestConstraint:
    """A constraint whose failure ends its own sequence instead of the engine.

    Args:
        inner: the grammar in progress.

    Attributes:
        error: what went wrong, or None.
    """

    def __init__(self, inner: Constraint) -> None:
        self.error: Qwen2KitError | None = None
        self._inner = inner

    @property
    def finished(self) -> bool:
        return self.error is not None or self._inner.finished

    def mask(self) -> NDArray[np.uint32] | None:
        if self.error is None:
            try:
                return self._inner.mask()
            except Qwen2KitError as error:
                self.error = error
        return None

    def forced(self) -> tuple[int, ...]:
        """See `qwen2kit.engine.jump_ahead.ForcingConstraint`."""
        if self.error is not None or not isinstance(self._inner, ForcingConstraint):
            return ()
        return self._inner.forced()

    def accept(self, token: int) -> None:
        if self.error is None:
            try:
                self._inner.accept(token)
            except Qwen2KitError as error:
                self.error = error


class Constraints:
    """Makes constraints; safe to call from several threads."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._lock = threading.Lock()
        self._compiler: ConstraintCompiler | None = None

    def build(self, request: GenerationFields) -> RequestConstraint | None:
        """A fresh constraint for one sequence of ``request``; None if it asks for none.

        Raises:
            ApiError: the grammar is invalid, contradicts ``tool_choice`` or cannot be enforced
                here.
        """
        try:
            inner = self._grammar(request)
        except Qwen2KitError as error:
            raise invalid(str(error), param=_field(request)) from None
        return None if inner is None else RequestConstraint(inner)

    def _grammar(self, request: GenerationFields) -> Constraint | None:
        if isinstance(request, ChatRequest) and must_call(request):
            chosen = request.chosen_tool
            tools = request.offered_tools if chosen is None else [chosen]
            return self._compile().tool_calls(
                {tool.function.name: tool.function.parameters or {} for tool in tools}
            )
        if request.guided_regex is not None:
            return self._compile().regex(request.guided_regex)
        if request.guided_json is not None:
            return self._compile().json_schema(request.guided_json)
        if isinstance(request.structure, JsonSchemaFormat):
            return self._compile().json_schema(request.structure.json_schema.schema_)
        return None if request.structure is None else self._compile().json_object()

    def _compile(self) -> ConstraintCompiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = ConstraintCompiler(
                    self._loaded.tokenizer,
                    self._loaded.model.spec.vocab_size,
                    self._loaded.sampling().stop_token_ids,
                )
            return self._compiler


def must_call(request: ChatRequest) -> bool:
    """Whether the answer has to be a tool call."""
    return request.tool_choice not in (None, "none", "auto")


def _field(request: GenerationFields) -> str:
    if isinstance(request, ChatRequest) and must_call(request):
        return "tools"
    return next(
        (name for name in ("guided_regex", "guided_json") if getattr(request, name) is not None),
        "response_format",
    )
