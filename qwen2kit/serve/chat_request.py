"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from qwen2kit.serve.fields import GenerationFields, Strict

MAX_TOP_LOGPROBS = 20
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class TextPart(Strict):
    """A piece of a message; text is the only kind there is."""

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(min_length=1)]
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")],
    Discriminator(lambda content: "parts" if isinstance(content, list) else "text"),
]


class CalledFunction(Strict):
    """A call the assistant made: name, and arguments as a JSON object in text."""

    name: FunctionName
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _holds_an_object(cls, text: str) -> str:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError("must be the text of a JSON object")
        return text


class MadeCall(Strict):
    """An entry of an assistant message's ``tool_calls``."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None


class SystemMessage(Strict):
    """Instructions; ``developer`` is OpenAI's newer word for ``system``."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Strict):
    """What the model said, or called."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[MadeCall] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("content or tool_calls is required")
        return self


class ToolMessage(Strict):
    """What a function returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Strict):
    """A function on offer."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """An entry of ``tools``."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The function a choice names."""

    name: FunctionName


class NamedTool(Strict):
    """``tool_choice`` that names one function."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(GenerationFields):
    """A conversation to continue."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.max_completion_tokens is not None and self.max_tokens is not None:
            raise ValueError("max_tokens: give max_tokens or max_completion_tokens, not both")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice: only allowed with tools")
        if isinstance(self.tool_choice, NamedTool) and self.chosen_tool is None:
            raise ValueError("tool_choice: names a function that is not in tools")
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None where the request leaves it open."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools the model may see."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def chosen_tool(self) -> Tool | None:
        """The tool that ``tool_choice`` names."""
        if not isinstance(self.tool_choice, NamedTool):
            return None
        name = self.tool_choice.function.name
        return next((tool for tool in self.tools or [] if tool.function.name == name), None)
