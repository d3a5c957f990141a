"""Request fields that both generating endpoints share, checked as OpenAI checks them.

Types are strict (``"0.5"`` is no number), unknown fields are refused, and the fields of OpenAI's
API that change nothing here are listed by name.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qwen2kit.serve.errors import ApiError, invalid

IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prediction", "reasoning_effort", "verbosity",
})  # fmt: skip
"""Fields of OpenAI's API that do not change what a local model answers."""

_MAX_STOP = 16
_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
_MESSAGES = {
    "extra_forbidden": "this server knows no such field; leave it out",
    "none_required": "not supported here; leave it out",
}

StopText = Annotated[str, Field(min_length=1, max_length=1024)]


class Strict(BaseModel):
    """No coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """``include_usage`` adds a last chunk with the token counts."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    """The schema of a ``response_format``."""

    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextFormat(Strict):
    """No constraint."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON of one schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class GenerationFields(Strict):
    """Sampling, limits and constraints.

    Beyond OpenAI's: ``top_k``, ``repetition_penalty``, ``guided_regex``, ``guided_json``, and
    ``ignore_eos``, which lets only the length end an answer (for load tests).
    """

    model: str = Field(min_length=1, max_length=512)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopText | list[StopText] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_regex: str | None = Field(None, min_length=1, max_length=1 << 16)
    guided_json: dict[str, Any] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if key not in IGNORED}
        return values

    @model_validator(mode="after")
    def _check(self) -> GenerationFields:
        if len(self.stops) > _MAX_STOP:
            raise ValueError(f"stop: at most {_MAX_STOP} strings are taken")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        shapes = (self.guided_regex, self.guided_json, self.structure)
        if sum(shape is not None for shape in shapes) > 1:
            raise ValueError(
                "response_format: give one of response_format, guided_json and guided_regex"
            )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, none or more."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def structure(self) -> JsonObjectFormat | JsonSchemaFormat | None:
        """The response format, if it constrains anything."""
        return None if isinstance(self.response_format, TextFormat) else self.response_format

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


def refusal(error: ValidationError) -> ApiError:
    """The first problem as a 400 that names its field."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    message = _MESSAGES.get(first["type"], re.sub(r"^Value error, ", "", first["msg"]))
    field, colon, _ = message.partition(":")
    if not path and colon and field.isidentifier():
        path = field
    elif path:
        message = f"{path}: {message}"
    return invalid(message, param=path or None, code=_CODES.get(first["type"]))
