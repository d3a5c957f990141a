"""Continuing a batch of prompts token by token; a single stream is a batch of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2kit.backend.protocol import TokenEvent
from qwen2kit.generate.sampling import Sampler, Sampling
from qwen2kit_torch.kv_cache import KVCache
from qwen2kit_torch.model import Qwen2
from qwen2kit_torch.prefill import prefill

_HEADROOM = 512


@dataclass(slots=True)
class _Row:
    """One running prompt: ``room`` is how many tokens it may still produce."""

    prompt: int
    room: int
    sampler: Sampler


def generate(
    model: Qwen2, prompts: Sequence[Sequence[int]], sampling: Sampling, *, limit: int
) -> Iterator[TokenEvent]:
    """Events as `CompiledModel.generate` describes them.

    Args:
        model: loaded.
        prompts: valid, non-empty token ids.
        sampling: how to choose tokens and when to stop.
        limit: longest sequence; a prompt that fills it still gets one token.
    """
    rows = [
        _Row(i, min(sampling.max_new_tokens, max(1, limit - len(p))), Sampler(sampling, p, i))
        for i, p in enumerate(prompts)
    ]
    batch = _Batch(model, prompts, sampling, max(row.room for row in rows))
    while rows:
        running = []
        chosen = batch.choose([row.sampler for row in rows])
        for index, (row, (token, logprob)) in enumerate(zip(rows, chosen, strict=True)):
            row.room -= 1
            reason = sampling.finish_reason(token, row.room)
            if reason is None:
                running.append(index)
            yield TokenEvent(row.prompt, token, reason, logprob)
        rows = [rows[index] for index in running]
        if rows:
            batch.advance(running, [chosen[index][0] for index in running])


class _Batch:
    """The device side: cache and the current logits ``[R, V]`` of the running rows."""

    def __init__(
        self, model: Qwen2, prompts: Sequence[Sequence[int]], sampling: Sampling, room: int
    ) -> None:
        weight = model.model.embed_tokens.weight
        self._model, self._sampling, self._device = model, sampling, weight.device
        with torch.inference_mode():
            self._cache = KVCache(
                model.spec,
                rows=len(prompts),
                device=weight.device,
                dtype=weight.dtype,
                capacity=max(map(len, prompts)) + min(room, _HEADROOM),
            )
            self._logits = model.head(prefill(model, prompts, self._cache))

    @torch.inference_mode()
    def choose(self, samplers: Sequence[Sampler]) -> list[tuple[int, float | None]]:
        """The next token of every row, and its log-probability if asked for."""
        if self._sampling.is_plain_greedy:
            best: list[int] = self._logits[:, : self._sampling.vocab_limit].argmax(-1).tolist()
            return [(token, None) for token in best]
        rows = self._logits.float().cpu().numpy()
        return [sampler.draw(row) for sampler, row in zip(samplers, rows, strict=True)]

    @torch.inference_mode()
    def advance(self, running: Sequence[int], tokens: Sequence[int]) -> None:
        """Feed ``tokens`` to the rows that go on; the others leave the batch.

        The first call packs the weights: it costs some ten decode steps, which scoring and
        loading are spared.
        """
        self._model.pack()
        if len(running) < len(self._cache.lengths):
            self._cache.keep_rows(running)
        fed: Tensor = torch.tensor(tokens, device=self._device)[:, None]
        self._logits = self._model.head(self._model.forward_hidden(fed, cache=self._cache)[:, 0])
