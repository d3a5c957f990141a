"""How long a sequence may be, and the checks every entry point makes on token ids."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec, YarnScaling


def context_limit(spec: ModelSpec, plan: ExecutionPlan) -> int:
    """Longest sequence in tokens, new ones included.

    It is ``max_position_embeddings``; with YaRN at least ``factor`` times the training length,
    because published configs switch YaRN on without raising ``max_position_embeddings``.
    ``plan.max_seq_len`` can only lower it.

    Raises:
        BackendError: ``plan.max_seq_len`` is not positive or exceeds what the model can take.
    """
    limit = spec.max_position_embeddings
    scaling = spec.rope.scaling
    if isinstance(scaling, YarnScaling):
        limit = max(limit, int(scaling.factor * scaling.original_max_position_embeddings))
    if spec.dual_chunk is not None:
        limit = min(limit, spec.dual_chunk.chunk_size + 1)
    if plan.max_seq_len is None:
        return limit
    if not 1 <= plan.max_seq_len <= limit:
        raise BackendError(
            f"max_seq_len={plan.max_seq_len} is outside what this model can take on torch: "
            f"1 to {limit} tokens"
        )
    return plan.max_seq_len


def check_tokens(tokens: Sequence[int], spec: ModelSpec, limit: int, what: str) -> None:
    """Refuse empty, too long or out-of-vocabulary input.

    Raises:
        BackendError: naming ``what`` and the problem.
    """
    if not tokens:
        raise BackendError(f"{what} is empty; it needs at least one token")
    if len(tokens) > limit:
        hint = ""
        if spec.dual_chunk is not None and limit == spec.dual_chunk.chunk_size + 1:
            hint = " (dual chunk attention, which longer inputs need, is not in the torch backend)"
        raise BackendError(
            f"{what} has {len(tokens)} tokens, the model takes {limit}{hint}; shorten it"
        )
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= spec.vocab_size:
        raise BackendError(
            f"{what} holds token id {low if low < 0 else high}, the vocabulary is 0 to "
            f"{spec.vocab_size - 1}; use the model's own tokenizer"
        )
