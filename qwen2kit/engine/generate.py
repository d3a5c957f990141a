"""Prompts in, tokens out: a batch of requests, run by an engine that lives as long as they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwen2kit.backend.limits import check_tokens
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.values import TokenEvent, TokenIds
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.request import Request
from qwen2kit.errors import NonFiniteLogits
from qwen2kit.generate.sampling import Sampling

_SPARE_TOKENS = 1 << 15


def generate(
    model: CompiledModel, prompts: Sequence[TokenIds], sampling: Sampling
) -> Iterator[TokenEvent]:
    """Continue every prompt (ragged lengths allowed) as one batch.

    Events of different prompts interleave; the last event of each prompt carries a
    ``finish_reason``. The result does not depend on what else is in the batch: the random stream
    of a prompt is its index. A prompt that fills the model's limit still gets one token. Prompts
    beyond what memory holds at a time start as others end. Closing the iterator frees the cache.

    Raises:
        BackendError: a prompt is empty, longer than the model can take, or holds a token id
            outside the vocabulary; raised at once.
        NonFiniteLogits: those of some prompt are NaN or infinite; raised when all others have
            ended.
    """
    for index, prompt in enumerate(prompts):
        check_tokens(prompt, model.spec, model.limit, f"prompt {index}")
    return _generate(model, prompts, sampling)


def _generate(
    model: CompiledModel, prompts: Sequence[TokenIds], sampling: Sampling
) -> Iterator[TokenEvent]:
    needs = [min(model.limit, len(prompt) + sampling.max_new_tokens) for prompt in prompts]
    broken = False
    for group in _groups(needs):
        with Engine(model, slots=len(group), capacity=needs[group[-1]]) as engine:
            for index in group:
                engine.submit(Request(tuple(prompts[index]), sampling, stream=index))
            while engine.busy:
                for event in engine.step():
                    if event.finish_reason == "error":
                        broken = True
                    else:
                        yield _renamed(event, group[event.prompt])
    if broken:
        raise NonFiniteLogits


def _groups(needs: Sequence[int]) -> Iterator[list[int]]:
    """Indices by rising need, cut where equally large slots would waste too much on short ones."""
    group: list[int] = []
    used = 0
    for index in sorted(range(len(needs)), key=needs.__getitem__):
        if needs[index] * (len(group) + 1) - used - needs[index] > _SPARE_TOKENS:
            yield group
            group, used = [], 0
        group.append(index)
        used += needs[index]
    if group:
        yield group


def _renamed(event: TokenEvent, prompt: int) -> TokenEvent:
    return TokenEvent(prompt, event.token, event.finish_reason, event.logprob, event.top)
