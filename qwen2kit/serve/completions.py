"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from qwen2kit.engine.text import TextEvent
from qwen2kit.serve.answers import Choice, Piece, batches, new_id, usage, whole_choices
from qwen2kit.serve.completion_request import DEFAULT_MAX_TOKENS, CompletionRequest
from qwen2kit.serve.errors import invalid
from qwen2kit.serve.prompts import completion_prompts
from qwen2kit.serve.score_memory import PromptScores
from qwen2kit.serve.service import Service
from qwen2kit.serve.sse import TextEvents, sse
from qwen2kit.serve.ticket import Job, Work
from qwen2kit.serve.token_text import CompletionLogprobs, ScoredToken


class CompletionAnswer:
    """`Answer` to a completion request; without a job where nothing is to be generated.

    Args:
        service: the model.
        request: checked.
    """

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        self._service = service
        self._request = request
        self._tokenizer = service.loaded.tokenizer
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }
        self._prompts: list[tuple[int, ...]] = []
        self._works: list[Work] = []
        self._job: Job | None = None

    async def start(self) -> None:
        request = self._request
        self._service.check_model(request.model)
        self._service.dispatcher.check_room(len(request.prompts) * request.choices_per_prompt)
        self._works = await asyncio.to_thread(self._make_works)
        if self._works and not self._is_scored:
            self._job = await self._service.dispatcher.submit(self._works)

    async def whole(self) -> dict[str, Any]:
        choices = self._choices()
        scores = await self._scores()
        said = [piece async for batch in self._batches(choices) for piece in batch]
        return {
            **self._head,
            "choices": [self._choice(piece, scores) for piece in whole_choices(said, len(choices))],
            "usage": self._usage(choices),
        }

    async def stream(self) -> AsyncIterator[str]:
        choices = self._choices()
        offsets = [CompletionLogprobs(self._tokenizer) for _ in choices]
        texts = [TextEvents(partial(self._chunk, choice.index)) for choice in choices]
        for choice in choices if self._request.echo else ():
            yield texts[choice.index].around(self._prompt_text(choice.index))
        async for batch in self._batches(choices):
            events = []
            for piece in batch:
                logprobs = None
                if self._request.logprobs is not None:
                    tokens = [ScoredToken.of(event) for event in piece.tokens]
                    logprobs = offsets[piece.index].render(tokens)
                if logprobs or piece.finish_reason:
                    chunk = self._chunk(piece.index, piece.text, logprobs, piece.finish_reason)
                    events.append(sse(chunk))
                elif piece.text:
                    events.append(texts[piece.index].around(piece.text))
            if events:
                yield "".join(events)
        if self._request.wants_usage:
            yield sse({**self._head, "choices": [], "usage": self._usage(choices)})

    def release(self) -> None:
        if self._job is not None:
            self._service.dispatcher.cancel(self._job)

    def _batches(self, choices: list[Choice]) -> AsyncIterator[list[Piece]]:
        return _nothing(choices) if self._job is None else batches(self._job, choices)

    def _usage(self, choices: list[Choice]) -> dict[str, int]:
        return usage(sum(map(len, self._prompts)), sum(choice.tokens for choice in choices))

    def _make_works(self) -> list[Work]:
        request = self._request
        self._prompts = completion_prompts(self._tokenizer, request)
        for prompt in self._prompts:
            if max(prompt) >= self._tokenizer.vocab_size:
                raise invalid(
                    f"prompt: token id {max(prompt)} is outside the vocabulary of "
                    f"{self._tokenizer.vocab_size}",
                    param="prompt",
                )
        if request.max_tokens == 0:
            for prompt in self._prompts:
                self._service.token_limit(len(prompt), None)
            return []
        limit = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        return self._service.works(
            request,
            self._prompts,
            max_tokens=limit,
            stop=request.stops,
            top_logprobs=request.logprobs,
        )

    @property
    def _is_scored(self) -> bool:
        """Whether the scores of the prompts are wanted."""
        return bool(self._request.echo) and self._request.logprobs is not None

    async def _scores(self) -> list[PromptScores]:
        """Of every prompt, where the request wants them. Text is generated afterwards: then its
        prompt has been read."""
        if not self._is_scored:
            return []
        dispatcher = self._service.dispatcher
        found = await dispatcher.score(self._prompts, self._request.logprobs or 0)
        if self._works:
            self._job = await dispatcher.submit(self._works, admitted=True)
        return found

    def _choices(self) -> list[Choice]:
        return [
            Choice(index) for index in range(len(self._prompts) * self._request.choices_per_prompt)
        ]

    def _choice(self, choice: Piece, scores: list[PromptScores]) -> dict[str, Any]:
        echoed = self._prompt_text(choice.index) if self._request.echo else ""
        logprobs = None
        if self._request.logprobs is not None:
            tokens = [ScoredToken.of(event) for event in choice.tokens]
            if scores:
                number = self._prompt_number(choice.index)
                first = ScoredToken(self._prompts[number][0], None, echoed=True)
                tokens = [first, *map(ScoredToken.of, scores[number]), *tokens]
            offset = 0 if scores else len(echoed)
            logprobs = CompletionLogprobs(self._tokenizer, offset).render(tokens)
        return {
            "index": choice.index,
            "text": echoed + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head, "choices": [choice]}
        return chunk | {"usage": None} if self._request.wants_usage else chunk

    def _prompt_number(self, index: int) -> int:
        return index // self._request.choices_per_prompt

    def _prompt_text(self, index: int) -> str:
        return self._tokenizer.decode(self._prompts[self._prompt_number(index)])


async def _nothing(choices: list[Choice]) -> AsyncIterator[list[Piece]]:
    """Where no text is asked for."""
    yield [choice.take(TextEvent(choice.index, "", (), "length")) for choice in choices]
