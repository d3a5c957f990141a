"""Log-probabilities of continuations: packs of the prefix tree, every shared prefix once.

Shape suffixes: T tokens of a pack, N scored positions, M continuation tokens, D hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.protocol import Score, ScoreRequest
from qwen2kit.generate.prefix import plan_scores
from qwen2kit.generate.prefix_pack import Pack, pack_steps
from qwen2kit_mlx.attention import Prompt
from qwen2kit_mlx.device_logits import LOGIT_ROWS
from qwen2kit_mlx.memory import bounded_by_memory
from qwen2kit_mlx.model import Decoder
from qwen2kit_mlx.passes import PREFILL_TOKENS
from qwen2kit_mlx.slot_store import SlotStore
from qwen2kit_mlx.tree_attention import Tree

SHORTER = "shorter prompts or a model of fewer bits"
CPU_PACK = 256  # a CPU is busy with this many tokens; masks make larger packs dearer there


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of a pack's M lookups: which ones, their log-probabilities, whether each is best."""

    which: NDArray[np.intp]
    logprobs: mx.array
    best: mx.array


def score(
    decoder: Decoder, requests: Sequence[ScoreRequest], device: mx.Device
) -> Iterator[tuple[int, Score]]:
    """Scores in the order of `plan_scores`; see `CompiledModel.score`. The device works on one
    pack while the one before is handed out."""
    store = SlotStore(decoder.spec, 1, decoder.dtype)
    budget = CPU_PACK if device.type == mx.cpu else PREFILL_TOKENS
    running: tuple[Pack, list[_Part]] | None = None
    try:
        for pack in pack_steps(plan_scores(requests), budget):
            with mx.stream(device):
                parts = _run(decoder, store, pack)
            if running is not None:
                yield from _read(*running)
            running = pack, parts
        if running is not None:
            yield from _read(*running)
    finally:
        store.drop()
        mx.clear_cache()


@bounded_by_memory(SHORTER)
def _run(decoder: Decoder, store: SlotStore, pack: Pack) -> list[_Part]:
    if not np.array_equal(pack.kept, np.arange(len(pack.kept))):
        store.keep(pack.kept.tolist())
    wanted = pack.lookups()
    hidden_ND = _hidden(decoder, store, pack, wanted.positions)
    parts = _look_up(decoder, hidden_ND, wanted.rows, wanted.tokens)
    mx.async_eval(*((part.logprobs, part.best) for part in parts))  # type: ignore[no-untyped-call]
    return parts


def _hidden(decoder: Decoder, store: SlotStore, pack: Pack, scored: NDArray[np.int64]) -> mx.array:
    """Feed the pack; residual stream ``[N, D]`` of the ``scored`` positions."""
    if not pack.is_plain:
        tree = Tree(decoder.heads, store, pack)
        tokens_T = np.pad(pack.tokens, (0, tree.count - len(pack.tokens)))
        return decoder(_row(tokens_T), tree)[mx.array(scored)]
    found = []
    for begin in range(0, len(pack.tokens), PREFILL_TOKENS):
        tokens_T = pack.tokens[begin : begin + PREFILL_TOKENS]
        end = begin + len(tokens_T)
        attend = Prompt(decoder.heads, store, 0, len(pack.kept) + begin, len(tokens_T))
        hidden_TD = decoder(_row(tokens_T), attend)
        inside = scored[(scored >= begin) & (scored < end)] - begin
        if len(inside):
            found.append(hidden_TD[mx.array(inside)])
        if end < len(pack.tokens):
            mx.eval(store.arrays(), found)
    return mx.concatenate(found)


def _row(tokens_T: NDArray[np.int64]) -> mx.array:
    return mx.array(tokens_T.astype(np.int32))[None]


def _look_up(
    decoder: Decoder, hidden_ND: mx.array, rows: NDArray[np.intp], tokens: NDArray[np.int64]
) -> list[_Part]:
    """For each of M (row of ``hidden_ND``, token): its log-probability, and whether it is the
    row's argmax."""
    parts = []
    for start in range(0, hidden_ND.shape[0], LOGIT_ROWS):
        inside = np.flatnonzero((rows >= start) & (rows < start + LOGIT_ROWS))
        logits_NV = decoder.logits(hidden_ND[start : start + LOGIT_ROWS]).astype(mx.float32)
        row, token = mx.array(rows[inside] - start), mx.array(tokens[inside])
        logprobs = logits_NV[row, token] - decoder.kernels.log_sum_exp(logits_NV)[row]
        parts.append(_Part(inside, logprobs, mx.argmax(logits_NV, axis=-1)[row] == token))
    return parts


def _read(pack: Pack, parts: Sequence[_Part]) -> Iterator[tuple[int, Score]]:
    count = sum(len(target.tokens) for target in pack.targets)
    logprobs, best = np.empty(count), np.empty(count, dtype=np.bool_)
    with bounded_by_memory(SHORTER):
        for part in parts:
            logprobs[part.which] = np.asarray(part.logprobs)
            best[part.which] = np.asarray(part.best)
    yield from pack.scores(logprobs, best)
