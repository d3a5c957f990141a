"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from qwen2kit.serve.fields import GenerationFields

MAX_TOP_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16
"""OpenAI's own default for this endpoint."""

TokenId = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """Prompts as text or token ids, one or several.

    ``max_tokens=0`` with ``echo`` scores the prompt and generates nothing.
    """

    prompt: str | Tokens | Texts | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: None = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.choices_per_prompt:
            raise ValueError("best_of: only the value of n is supported")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs echo")
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("stream: echo with logprobs is not streamed")
        return self

    @property
    def choices_per_prompt(self) -> int:
        """``n``."""
        return self.n or 1

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt
