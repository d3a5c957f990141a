"""What the endpoints share: the model behind them and how a request becomes work for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwen2kit.serve.constraints import Constraints
from qwen2kit.serve.dispatcher import Dispatcher
from qwen2kit.serve.errors import ApiError, invalid
from qwen2kit.serve.fields import GenerationFields
from qwen2kit.serve.limits import Limits
from qwen2kit.serve.metrics import Metrics
from qwen2kit.serve.prompts import special_stops
from qwen2kit.serve.sampling import sampling_of
from qwen2kit.serve.ticket import Work

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel


@dataclass(slots=True, kw_only=True)
class Service:
    """One served model.

    Attributes:
        name: the id that requests give as ``model``.
        loaded: the model.
        capacity: longest sequence in tokens, prompt and answer.
        limits: of the server.
        metrics: of the server.
        dispatcher: the way to the engine.
        constraints: grammars.
        created: when serving began, Unix time.
    """

    name: str
    loaded: LoadedModel
    capacity: int
    limits: Limits
    metrics: Metrics
    dispatcher: Dispatcher
    constraints: Constraints
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str) -> None:
        """Raise ApiError (404) for the name of another model."""
        if name != self.name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist here; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def works(
        self,
        request: GenerationFields,
        prompts: Sequence[tuple[int, ...]],
        *,
        max_tokens: int | None,
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
    ) -> list[Work]:
        """``n`` sequences per prompt, in the order of the answer's choices. Blocks while grammars
        are built.

        Args:
            request: the request.
            prompts: token ids.
            max_tokens: what the request says; None is all the context holds.
            stop: stop strings.
            top_logprobs: see `sampling_of`.

        Raises:
            ApiError: a limit is exceeded, or a value makes no sense for this model.
        """
        count = (request.n or 1) * len(prompts)
        if count > self.limits.max_choices:
            raise invalid(
                f"{count} choices are more than the {self.limits.max_choices} of one request",
                param="n",
            )
        stop_ids, stop_texts = special_stops(self.loaded.tokenizer, stop)
        works: list[Work] = []
        for prompt in prompts:
            sampling = sampling_of(
                self.loaded,
                request,
                max_new_tokens=self.token_limit(len(prompt), max_tokens),
                stop_ids=stop_ids,
                top_logprobs=top_logprobs,
            )
            for _ in range(request.n or 1):
                works.append(
                    Work(
                        prompt=prompt,
                        sampling=sampling,
                        stop=stop_texts,
                        stream=len(works),
                        constraint=self.constraints.build(request),
                    )
                )
        return works

    def token_limit(self, prompt: int, wanted: int | None) -> int:
        """Tokens to generate after a prompt of that length; one is possible even where the prompt
        fills the context.

        Raises:
            ApiError: the context or the server's limit is exceeded.
        """
        room = max(1, self.capacity - prompt)
        if prompt > self.capacity or (wanted or 0) > room:
            asked = f" and {wanted} more are asked for" if wanted else ""
            raise invalid(
                f"the context holds {self.capacity} tokens, but the prompt has {prompt}{asked}; "
                "shorten one of them",
                code="context_length_exceeded",
            )
        most = self.limits.max_tokens
        if most is not None and (wanted or 0) > most:
            raise invalid(f"max_tokens: at most {most} tokens per choice", param="max_tokens")
        return min(limit for limit in (room, wanted, most) if limit is not None)
