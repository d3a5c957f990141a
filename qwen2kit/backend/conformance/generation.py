"""Cases about generation: greedy and sampled text, batches, stopping, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from qwen2kit.backend.conformance.case import Case, require, require_close, require_raises
from qwen2kit.backend.conformance.models import (
    DENSE,
    TOLERANCE,
    UNTIED,
    WINDOW,
    loaded,
    reference_continuation,
    reference_logprobs,
    tokens,
)
from qwen2kit.backend.protocol import Backend, CompiledModel
from qwen2kit.backend.values import TokenEvent
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.generate import generate
from qwen2kit.engine.request import Request
from qwen2kit.errors import BackendError
from qwen2kit.generate.sampling import Sampling
from qwen2kit.spec.model import ModelSpec

_GREEDY = Sampling(max_new_tokens=24)
_SAMPLED = Sampling(
    max_new_tokens=16, temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=11
)
_RAGGED = (tokens(9), tokens(1, seed=2), tokens(31, seed=3), tokens(9, seed=4), tokens(4, seed=6))


def events(
    model: CompiledModel, prompts: Sequence[tuple[int, ...]], sampling: Sampling
) -> list[list[TokenEvent]]:
    """Generated events per prompt; fails if a prompt gets none or goes on after its last one."""
    found: list[list[TokenEvent]] = [[] for _ in prompts]
    for event in generate(model, prompts, sampling):
        require(0 <= event.prompt < len(prompts), f"event for prompt {event.prompt}")
        mine = found[event.prompt]
        ended = bool(mine) and mine[-1].finish_reason is not None
        require(not ended, f"prompt {event.prompt} goes on after its finish_reason")
        mine.append(event)
    for index, mine in enumerate(found):
        require(mine, f"prompt {index} got no token")
        require(mine[-1].finish_reason, f"prompt {index} ends without a finish_reason")
    return found


def _ids(found: Sequence[TokenEvent]) -> tuple[int, ...]:
    return tuple(event.token for event in found)


def _matches_reference(
    backend: Backend, prompts: Sequence[tuple[int, ...]], sampling: Sampling, spec: ModelSpec
) -> None:
    for index, mine in enumerate(events(loaded(backend, spec), prompts, sampling)):
        expected = reference_continuation(spec, prompts[index], sampling, stream=index)
        require(
            _ids(mine) == expected,
            f"prompt {index}: generated {_ids(mine)}, the reference {expected}",
        )


def _batch_is_single(backend: Backend, sampling: Sampling) -> None:
    model = loaded(backend, UNTIED)
    together = events(model, _RAGGED, sampling)
    alone = _ids(events(model, _RAGGED[:1], sampling)[0])
    require(_ids(together[0]) == alone, "the first prompt's text depends on its batch")
    fewer = events(model, _RAGGED[:3], sampling)
    for index, mine in enumerate(fewer):
        require(_ids(mine) == _ids(together[index]), f"prompt {index} depends on its batch")


def _stops(backend: Backend) -> None:
    free = [reference_continuation(UNTIED, prompt, _GREEDY) for prompt in _RAGGED]
    sampling = replace(_GREEDY, stop_token_ids=(free[0][6], free[2][11]))
    for index, mine in enumerate(events(loaded(backend, UNTIED), _RAGGED, sampling)):
        expected = reference_continuation(UNTIED, _RAGGED[index], sampling)
        require(_ids(mine) == expected, f"prompt {index}: {_ids(mine)}, expected {expected}")
        stopped = expected[-1] in sampling.stop_token_ids
        reason = "stop" if stopped else "length"
        require(
            mine[-1].finish_reason == reason,
            f"prompt {index}: finish_reason {mine[-1].finish_reason!r}, expected {reason!r}",
        )
        early = [event for event in mine[:-1] if event.finish_reason is not None]
        require(not early, f"prompt {index} has a finish_reason before its last token")


def _length(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    for count in (1, 2, 7):
        (mine,) = events(model, _RAGGED[:1], Sampling(max_new_tokens=count))
        require(len(mine) == count, f"max_new_tokens={count} gave {len(mine)} tokens")
        require(mine[-1].finish_reason == "length", f"ended by {mine[-1].finish_reason!r}")


def _vocab_limit(backend: Backend) -> None:
    for sampling in (_GREEDY, _SAMPLED):
        limited = replace(sampling, vocab_limit=40)
        _matches_reference(backend, _RAGGED[:2], limited, UNTIED)


def _seeds(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    hot = replace(_SAMPLED, temperature=1.5, top_k=0, top_p=1.0)
    first, again = (events(model, [_RAGGED[0]] * 2, hot) for _ in range(2))
    require([_ids(m) for m in first] == [_ids(m) for m in again], "the same seed gave other text")
    require(_ids(first[0]) != _ids(first[1]), "equal prompts of a batch share one random stream")
    other = events(model, [_RAGGED[0]] * 2, replace(hot, seed=12))
    require(_ids(other[0]) != _ids(first[0]), "another seed gave the same text")


def _logprobs(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    for sampling in (_GREEDY, _SAMPLED):
        (mine,) = events(model, _RAGGED[:1], replace(sampling, logprobs=True))
        ids = (*_RAGGED[0], *_ids(mine))
        rows = reference_logprobs(UNTIED, ids[:-1])[len(_RAGGED[0]) - 1 :]
        for row, event in zip(rows, mine, strict=True):
            found = event.logprob
            close = found is not None and abs(found - row[event.token]) <= TOLERANCE
            require(close, f"logprob {found}, expected {row[event.token]:.6f}")


def _top_logprobs(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    for changes in ({}, {"repetition_penalty": 1.3, "logit_bias": ((5, 3.0),)}):
        sampling = replace(_SAMPLED, top_logprobs=4, top_k=5, **changes)  # type: ignore[arg-type]
        (mine,) = events(model, _RAGGED[:1], sampling)
        rows = reference_logprobs(UNTIED, (*_RAGGED[0], *_ids(mine))[:-1])[len(_RAGGED[0]) - 1 :]
        for row, event in zip(rows, mine, strict=True):
            best = np.sort(row)[::-1][:4]
            found = [value for _, value in event.top]
            require(len(found) == 4, f"{len(found)} top log-probabilities instead of 4")
            require_close("top log-probabilities", np.array(found), best, TOLERANCE)
            named = np.array([row[token] for token, _ in event.top])
            require_close("log-probabilities of the named ids", named, best, TOLERANCE)


def _many_kinds(backend: Backend) -> None:
    """Requests of every kind together, more than there are slots, prompts read in small pieces,
    beginnings in common: each gets what it gets alone."""
    model = loaded(backend, UNTIED)
    stem = tokens(40, seed=9)
    prompts = (*_RAGGED, (*stem, 3), (*stem, 3), (*stem[:35], 4, 4), stem)
    kinds = (
        _GREEDY,
        _SAMPLED,
        replace(_GREEDY, frequency_penalty=0.8, presence_penalty=0.3),
        replace(_SAMPLED, top_k=0, top_p=1.0, logit_bias=((7, 2.0), (9, -50.0)), logprobs=True),
        replace(_GREEDY, vocab_limit=60),
    )
    for pairs in (
        [(prompt, kinds[index % len(kinds)]) for index, prompt in enumerate(prompts)],
        [(prompt, _GREEDY) for prompt in prompts],
    ):
        found: dict[int, list[int]] = {}
        with Engine(model, slots=3, capacity=80, prefill_tokens=11) as engine:
            for prompt, sampling in pairs:
                found[engine.submit(Request(prompt, sampling))] = []
            while engine.busy:
                for event in engine.step():
                    found[event.prompt].append(event.token)
        for (prompt, sampling), mine in zip(pairs, found.values(), strict=True):
            expected = reference_continuation(UNTIED, prompt, sampling)
            require(tuple(mine) == expected, f"{sampling}: {mine}, the reference {expected}")


def _early_close(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    expected = _ids(events(model, _RAGGED[:1], _GREEDY)[0])
    stream = generate(model, _RAGGED[:3], _GREEDY)
    next(stream)
    close = getattr(stream, "close", None)
    require(close is not None, "generate() gives an iterator without close()")
    if close is not None:
        close()
    require(_ids(events(model, _RAGGED[:1], _GREEDY)[0]) == expected, "text changed after close()")


def _interleaved(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    first, second = (generate(model, [prompt], _GREEDY) for prompt in (_RAGGED[0], _RAGGED[2]))
    found: tuple[list[int], list[int]] = ([], [])
    for one, two in zip(first, second, strict=True):
        found[0].append(one.token)
        found[1].append(two.token)
    for mine, prompt in zip(found, (_RAGGED[0], _RAGGED[2]), strict=True):
        expected = reference_continuation(UNTIED, prompt, _GREEDY)
        require(tuple(mine) == expected, "two generations at a time disturb each other")


def _too_long(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    long = tokens(UNTIED.max_position_embeddings + 1)
    require_raises(
        BackendError, lambda: list(generate(model, [long], _GREEDY)), "prompt beyond the limit"
    )


def _bad_prompts(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    for what, prompt in (
        ("empty prompt", ()),
        ("id beyond the vocabulary", (3, UNTIED.vocab_size)),
        ("negative id", (3, -1)),
    ):
        require_raises(BackendError, lambda p=prompt: list(generate(model, [p], _GREEDY)), what)  # type: ignore[misc]


_LONG_PROMPT = (tokens(70, seed=8),)

CASES = (
    *(
        Case(
            f"generate/greedy-{name}",
            partial(_matches_reference, prompts=_RAGGED[:1], sampling=_GREEDY, spec=DENSE[name]),
        )
        for name in ("tied", "untied", "multi-head", "yarn")
    ),
    Case(
        "generate/greedy-long-prompt",
        partial(_matches_reference, prompts=_LONG_PROMPT, sampling=_GREEDY, spec=UNTIED),
    ),
    Case(
        "generate/greedy-sliding-window",
        partial(_matches_reference, prompts=_RAGGED, sampling=_GREEDY, spec=WINDOW),
        lambda has: has.sliding_window,
    ),
    Case(
        "generate/ragged-batch",
        partial(_matches_reference, prompts=_RAGGED, sampling=_GREEDY, spec=UNTIED),
    ),
    Case(
        "generate/repetition-penalty",
        partial(
            _matches_reference,
            prompts=_RAGGED[:3],
            sampling=replace(_GREEDY, repetition_penalty=1.4),
            spec=DENSE["tied"],
        ),
    ),
    Case(
        "generate/sampled",
        partial(_matches_reference, prompts=_RAGGED, sampling=_SAMPLED, spec=UNTIED),
    ),
    Case("generate/batch-is-single-greedy", partial(_batch_is_single, sampling=_GREEDY)),
    Case("generate/batch-is-single-sampled", partial(_batch_is_single, sampling=_SAMPLED)),
    Case("generate/stop-ids", _stops),
    Case("generate/length", _length),
    Case("generate/vocab-limit", _vocab_limit),
    Case("generate/seeds", _seeds),
    Case("generate/logprobs", _logprobs),
    Case("generate/top-logprobs", _top_logprobs),
    Case(
        "generate/penalties-and-bias",
        partial(
            _matches_reference,
            prompts=_RAGGED[:3],
            sampling=replace(
                _SAMPLED,
                presence_penalty=0.4,
                frequency_penalty=0.7,
                logit_bias=((11, 2.5), (12, -3.0)),
            ),
            spec=UNTIED,
        ),
    ),
    Case("generate/many-kinds-together", _many_kinds),
    Case("generate/early-close", _early_close),
    Case("generate/two-at-a-time", _interleaved),
    Case("generate/too-long", _too_long),
    Case("generate/bad-prompts", _bad_prompts),
)
