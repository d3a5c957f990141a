"""``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from qwen2kit.backend.values import TokenEvent
from qwen2kit.generate.tool_calls import CLOSING, ToolCall, ToolCallParser
from qwen2kit.serve.answers import Choice, Piece, batches, new_id, usage, whole_choices
from qwen2kit.serve.chat_request import ChatRequest
from qwen2kit.serve.prompts import chat_prompt
from qwen2kit.serve.service import Service
from qwen2kit.serve.sse import TextEvents, sse
from qwen2kit.serve.ticket import Job, Work
from qwen2kit.serve.token_text import chat_logprobs


class ChatAnswer:
    """`Answer` to a chat request.

    Args:
        service: the model.
        request: checked.
    """

    def __init__(self, service: Service, request: ChatRequest) -> None:
        self._service = service
        self._request = request
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": service.name}
        self._job: Job | None = None
        self._choices: list[Choice] = []
        self._prompt_tokens = 0
        self._made_calls = [0] * (request.n or 1)

    async def start(self) -> None:
        self._service.check_model(self._request.model)
        self._service.dispatcher.check_room(self._request.n or 1)
        works = await asyncio.to_thread(self._works)
        self._prompt_tokens = len(works[0].prompt)
        self._choices = [Choice(index, self._parser()) for index in range(len(works))]
        self._job = await self._service.dispatcher.submit(works)

    async def whole(self) -> dict[str, Any]:
        said = [piece async for batch in self._batches() for piece in batch]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(item) for item in whole_choices(said, len(self._choices))],
            "usage": self._usage(),
        }

    async def stream(self) -> AsyncIterator[str]:
        for choice in self._choices:
            yield sse(self._chunk(choice.index, {"role": "assistant", "content": ""}))
        texts = [TextEvents(partial(self._text_chunk, choice.index)) for choice in self._choices]
        reports = bool(self._request.logprobs)
        async for batch in self._batches():
            events = [
                texts[piece.index].around(piece.text)
                if piece.text and not (reports or piece.calls or piece.finish_reason)
                else "".join(map(sse, self._chunks(piece)))
                for piece in batch
            ]
            if any(events):
                yield "".join(events)
        if self._request.wants_usage:
            yield sse(self._document([], self._usage()))

    def release(self) -> None:
        if self._job is not None:
            self._service.dispatcher.cancel(self._job)

    def _batches(self) -> AsyncIterator[list[Piece]]:
        assert self._job is not None
        return batches(self._job, self._choices)

    def _usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))

    def _works(self) -> list[Work]:
        request = self._request
        stop = list(request.stops)
        if request.offered_tools and self._one_call:
            stop.append(CLOSING)
        return self._service.works(
            request,
            [chat_prompt(self._service.loaded.tokenizer, request)],
            max_tokens=request.token_limit,
            stop=stop,
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )

    @property
    def _one_call(self) -> bool:
        """Whether the answer ends after one call."""
        return self._request.parallel_tool_calls is False or self._request.chosen_tool is not None

    def _parser(self) -> ToolCallParser | None:
        return ToolCallParser() if self._request.offered_tools else None

    def _choice(self, choice: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [_call(call) for call in choice.calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.calls:
            first = self._made_calls[piece.index]
            self._made_calls[piece.index] += len(piece.calls)
            delta["tool_calls"] = [
                {"index": first + offset} | _call(call) for offset, call in enumerate(piece.calls)
            ]
        logprobs = self._logprobs(piece.tokens)
        chunks = []
        if delta or (logprobs and logprobs["content"]):
            chunks.append(self._chunk(piece.index, delta, logprobs))
        if piece.finish_reason is not None:
            chunks.append(self._chunk(piece.index, {}, reason=piece.finish_reason))
        return chunks

    def _text_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text})

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._document([choice])

    def _document(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None
    ) -> dict[str, Any]:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return chunk | {"usage": usage} if self._request.wants_usage else chunk

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any] | None:
        """Of the tokens that make up the message; the one that ended it is none of them."""
        if not self._request.logprobs:
            return None
        said = [event for event in tokens if event.finish_reason != "stop"]
        return {"content": chat_logprobs(self._service.loaded.tokenizer, said), "refusal": None}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {
        "name": call.name,
        "arguments": json.dumps(call.arguments, ensure_ascii=False),
    }
    return {"id": new_id("call"), "type": "function", "function": function}
