"""Perplexity of one text by context length: the same tokens, seen with less or more before them.

Blocks of ``stride`` tokens are drawn evenly from the text. Each is scored once per length L, after
the L - stride tokens that precede it, so a token is predicted from L - stride to L - 1 tokens and
the curves differ by context alone. All blocks have the longest length before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

from tqdm import tqdm  # type: ignore[import-untyped]

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.backend.values import ScoreRequest
from qwen2kit.errors import ConfigError, DataError
from qwen2kit_evals.averages import mean_and_stderr
from qwen2kit_evals.request_log import RequestLog


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthPerplexity:
    """One point of the curve.

    Attributes:
        length: context and block together, in tokens.
        tokens: tokens scored.
        nll: their mean negative log-likelihood in nats.
        stderr: standard error of ``nll`` over blocks; None for a single block.
        perplexity: exp(nll).
        bits_per_byte: of the scored tokens' UTF-8 text.
    """

    length: int
    tokens: int
    nll: float
    stderr: float | None
    perplexity: float
    bits_per_byte: float


def context_perplexity(
    loaded: LoadedModel,
    text: str,
    lengths: Sequence[int],
    *,
    stride: int | None = None,
    blocks: int = 32,
    answers: RequestLog,
) -> list[LengthPerplexity]:
    """Score up to ``blocks`` blocks of ``text`` at every length, shortest first.

    Args:
        stride: tokens per block; default half the shortest length.
        answers: scores that are known, and where new ones go.

    Raises:
        ConfigError: a length is too short or exceeds the model's context, or a number is not
            positive.
        DataError: the text is shorter than the longest length.
    """
    lengths = sorted({*lengths})
    stride = (lengths[0] // 2 if lengths else 0) if stride is None else stride
    _check(lengths, stride, blocks, loaded.model.spec.context_length)
    tokens = loaded.tokenizer.encode(text)
    starts = block_starts(len(tokens), lengths[-1], stride, blocks)
    requests = [
        ScoreRequest(
            tuple(tokens[start + stride - length : start]), tuple(tokens[start : start + stride])
        )
        for length in lengths
        for start in starts
    ]
    nlls = [-logprob / stride for logprob in _scores(loaded, requests, answers)]
    scored = [token for start in starts for token in tokens[start : start + stride]]
    size = sum(len(loaded.tokenizer.token_bytes(token)) for token in scored)
    return [
        _point(length, nlls[n * len(starts) : (n + 1) * len(starts)], stride, size)
        for n, length in enumerate(lengths)
    ]


def block_starts(tokens: int, longest: int, stride: int, blocks: int) -> list[int]:
    """First tokens of the blocks: spread over the text, none overlapping another.

    Raises:
        DataError: the text has fewer than ``longest`` tokens.
    """
    first, last = longest - stride, tokens - stride
    if last < first:
        raise DataError(f"the text has {tokens} tokens, fewer than the longest length, {longest}")
    possible = range(first, last + 1, stride)
    chosen = min(blocks, len(possible))
    return [possible[index * len(possible) // chosen] for index in range(chosen)]


def _scores(
    loaded: LoadedModel, requests: Sequence[ScoreRequest], answers: RequestLog
) -> list[float]:
    keys = answers.score_keys(requests)
    found, open_ = answers.look_up(keys)
    with tqdm(total=len(keys), initial=len(keys) - len(open_), desc="Perplexity") as bar:
        for position, score in loaded.model.score([requests[index] for index in open_]):
            found[open_[position]] = score.logprob
            answers.add(keys[open_[position]], score.logprob)
            bar.update()
    return found


def _point(length: int, nlls: Sequence[float], stride: int, size: int) -> LengthPerplexity:
    mean, stderr = mean_and_stderr(nlls)
    tokens = stride * len(nlls)
    return LengthPerplexity(
        length=length,
        tokens=tokens,
        nll=mean,
        stderr=stderr,
        perplexity=exp(mean),
        bits_per_byte=mean * tokens / size / log(2),
    )


def _check(lengths: Sequence[int], stride: int, blocks: int, limit: int) -> None:
    if blocks < 1 or stride < 1:
        raise ConfigError(f"--blocks and --stride must be at least 1, got {blocks} and {stride}")
    if lengths[0] <= stride:
        raise ConfigError(f"--lengths must exceed the stride of {stride}, got {lengths[0]}")
    if lengths[-1] > limit:
        raise ConfigError(f"a length of {lengths[-1]} tokens exceeds the model's context, {limit}")
