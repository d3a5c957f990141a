"""What a request's fields mean to the sampler."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

from qwen2kit.errors import ConfigError
from qwen2kit.generate.sampling import Sampling
from qwen2kit.serve.errors import invalid
from qwen2kit.serve.fields import GenerationFields

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel

_SEEDS = 1 << 64
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")


def sampling_of(
    loaded: LoadedModel,
    request: GenerationFields,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    top_logprobs: int | None = None,
) -> Sampling:
    """Fields that a request leaves open are the checkpoint's own defaults.

    Args:
        loaded: the model.
        request: without a seed it gets one that nobody can guess.
        max_new_tokens: most tokens to generate.
        stop_ids: end the text, besides the checkpoint's own.
        top_logprobs: likeliest tokens to report per position; None reports no log-probabilities.

    Raises:
        ApiError: a value is out of range for this model.
    """
    defaults = loaded.sampling()
    ends = () if request.ignore_eos else defaults.stop_token_ids
    seed = secrets.randbits(63) if request.seed is None else request.seed % _SEEDS
    try:
        return loaded.sampling(
            max_new_tokens=max_new_tokens,
            stop_token_ids=tuple(dict.fromkeys((*ends, *stop_ids))),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=_logit_bias(request, defaults.vocab_limit),
            seed=seed,
            logprobs=top_logprobs is not None,
            top_logprobs=top_logprobs,
        )
    except ConfigError as error:
        raise invalid(str(error)) from None


def _logit_bias(
    request: GenerationFields, vocabulary: int | None
) -> tuple[tuple[int, float], ...] | None:
    """Pairs of id and bias. Raises ApiError if a key is not an id of the model."""
    if request.logit_bias is None:
        return None
    pairs = []
    for key, bias in request.logit_bias.items():
        if not _TOKEN_ID.fullmatch(key) or int(key) >= (vocabulary or 0):
            raise invalid(
                f"logit_bias: {key[:20]!r} is not a token id below {vocabulary}", param="logit_bias"
            )
        pairs.append((int(key), bias))
    return tuple(sorted(pairs))
