"""Batched decoding: chunked prefill, then one token per row and step.

Shape suffixes: B rows still running, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import mlx.core as mx
import numpy as np

from qwen2kit.backend.protocol import TokenEvent, TokenIds
from qwen2kit.generate.sampling import Sampler, Sampling
from qwen2kit_mlx.kv_cache import KVCache
from qwen2kit_mlx.model import Decoder

PREFILL_TOKENS = 2048  # tokens per forward pass, all rows together
CLEAR_EVERY = 256  # steps between returns of unused device buffers


@dataclass(slots=True)
class _Row:
    """One prompt being continued; ``left`` counts the tokens it may still produce."""

    prompt: int
    left: int
    sampler: Sampler | None


def generate(
    decoder: Decoder, prompts: Sequence[TokenIds], sampling: Sampling, limit: int, device: mx.Device
) -> Iterator[TokenEvent]:
    """Continue all prompts together; see `CompiledModel.generate`.

    Args:
        decoder: the model.
        prompts: non-empty, at most ``limit`` tokens each.
        sampling: how to choose tokens.
        limit: positions a sequence may fill.
        device: where to compute; made current only while computing, never while suspended.
    """
    greedy = sampling.is_plain_greedy
    rows = [
        _Row(
            index,
            min(sampling.max_new_tokens, limit - len(prompt) + 1),
            None if greedy else Sampler(sampling, prompt, index),
        )
        for index, prompt in enumerate(prompts)
    ]
    cache = KVCache(decoder.spec, len(rows), decoder.dtype)
    with mx.stream(device):
        hidden_BD = prefill(decoder, prompts, cache)
    run = _greedy if greedy else _sampled
    try:
        yield from run(decoder, cache, hidden_BD, rows, sampling, device)
    finally:
        cache.drop()
        mx.clear_cache()


def prefill(decoder: Decoder, prompts: Sequence[TokenIds], cache: KVCache) -> mx.array:
    """Run the prompts through an empty cache.

    Returns:
        Residual stream ``[B, D]`` at the last token of every prompt.
    """
    longest = max(map(len, prompts))
    tokens_BT = np.zeros((len(prompts), longest), dtype=np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    chunk = max(1, PREFILL_TOKENS // len(prompts))
    last: list[mx.array | None] = [None] * len(prompts)
    for start in range(0, longest, chunk):
        x_BTD = decoder(mx.array(tokens_BT[:, start : start + chunk]), cache)
        ends = {
            row: len(prompt) - 1 - start
            for row, prompt in enumerate(prompts)
            if start < len(prompt) <= start + chunk
        }
        for row, end in ends.items():
            last[row] = x_BTD[row, end]
        if start + chunk < longest:
            mx.eval(cache.arrays(), [last[row] for row in ends])
            mx.clear_cache()
    cache.lengths = [len(prompt) for prompt in prompts]
    return mx.stack([x for x in last if x is not None])


def _greedy(
    decoder: Decoder,
    cache: KVCache,
    hidden_BD: mx.array,
    rows: list[_Row],
    sampling: Sampling,
    device: mx.Device,
) -> Iterator[TokenEvent]:
    """The argmax stays on the device, and step n + 1 runs there while step n is handed out."""

    def best(hidden: mx.array) -> mx.array:
        tokens_B = mx.argmax(decoder.logits(hidden)[:, : sampling.vocab_limit], axis=-1)
        mx.async_eval(tokens_B)  # type: ignore[no-untyped-call]
        return tokens_B

    def follow(tokens_B: mx.array) -> mx.array:
        return best(decoder(tokens_B[:, None], cache)[:, 0])

    with mx.stream(device):
        tokens_B = best(hidden_BD)
    for step in count(1):
        following_B: mx.array | None = None
        with mx.stream(device):
            if decoder.kernels.lazy and any(row.left > 1 for row in rows):
                following_B = follow(tokens_B)
            ids = np.asarray(tokens_B).tolist()
        events, kept = _account(rows, [(token, None) for token in ids], sampling)
        yield from events
        if not kept:
            return
        with mx.stream(device):
            if len(kept) < len(rows):
                cache.select(kept)
                index = mx.array(kept)
                tokens_B = tokens_B[index]
                following_B = None if following_B is None else following_B[index]
                rows = [rows[row] for row in kept]
            tokens_B = follow(tokens_B) if following_B is None else following_B
            if step % CLEAR_EVERY == 0:
                mx.clear_cache()


def _sampled(
    decoder: Decoder,
    cache: KVCache,
    hidden_BD: mx.array,
    rows: list[_Row],
    sampling: Sampling,
    device: mx.Device,
) -> Iterator[TokenEvent]:
    """Logits go to the core sampler as float32; nothing can run ahead of its choice."""
    for step in count(1):
        with mx.stream(device):
            logits_BV = np.asarray(decoder.logits(hidden_BD).astype(mx.float32))
        drawn = [
            row.sampler.draw(logits_V)
            for row, logits_V in zip(rows, logits_BV, strict=True)
            if row.sampler is not None
        ]
        events, kept = _account(rows, drawn, sampling)
        yield from events
        if not kept:
            return
        with mx.stream(device):
            if len(kept) < len(rows):
                cache.select(kept)
                rows = [rows[row] for row in kept]
            tokens_B1 = mx.array([[drawn[row][0]] for row in kept], dtype=mx.int32)
            hidden_BD = decoder(tokens_B1, cache)[:, 0]
            if step % CLEAR_EVERY == 0:
                mx.clear_cache()


def _account(
    rows: list[_Row], drawn: Sequence[tuple[int, float | None]], sampling: Sampling
) -> tuple[list[TokenEvent], list[int]]:
    """Events of one step, and the indices of the rows that go on."""
    events: list[TokenEvent] = []
    kept: list[int] = []
    for index, (row, (token, logprob)) in enumerate(zip(rows, drawn, strict=True)):
        row.left -= 1
        reason = sampling.finish_reason(token, row.left)
        if reason is None:
            kept.append(index)
        events.append(TokenEvent(row.prompt, token, reason, logprob))
    return events, kept
