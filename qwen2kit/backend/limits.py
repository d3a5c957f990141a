"""How long a sequence may be, and the checks on token ids every backend makes before computing."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.values import ScoreRequest
from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec


def context_limit(spec: ModelSpec, plan: ExecutionPlan, *, dual_chunk: bool = False) -> int:
    """Longest sequence in tokens, new ones included; ``plan.max_seq_len`` can only lower it.

    Args:
        spec: the model.
        plan: the caller's wishes.
        dual_chunk: whether the backend has dual chunk attention. Without it such a model runs up
            to ``chunk_size + 1`` tokens, where it equals full attention (arXiv 2402.17463).

    Raises:
        BackendError: ``plan.max_seq_len`` is not positive or exceeds what the model can take.
    """
    limit = _limit(spec, dual_chunk)
    if plan.max_seq_len is None:
        return limit
    if not 1 <= plan.max_seq_len <= limit:
        raise BackendError(
            f"max_seq_len={plan.max_seq_len} is outside what this model can take here: "
            f"1 to {limit} tokens{_dual_chunk_hint(spec, limit)}"
        )
    return plan.max_seq_len


def check_cache_bits(plan: ExecutionPlan, supported: tuple[int, ...]) -> None:
    """Refuse a ``plan.cache_bits`` that is not one of `Capabilities.cache_bits`.

    Raises:
        BackendError: saying what there is.
    """
    if plan.cache_bits is None or plan.cache_bits in supported:
        return
    raise BackendError(
        f"this backend keeps keys and values in {' or '.join(map(str, supported))} bits or in the "
        f"compute dtype, not in {plan.cache_bits} bits"
        if supported
        else "this backend keeps keys and values in the compute dtype; leave out cache_bits, or "
        "use --backend mlx"
    )


def check_weight_bits(plan: ExecutionPlan, supported: tuple[int, ...]) -> None:
    """Refuse a ``plan.weight_bits`` that is not one of `Capabilities.weight_bits`.

    Raises:
        BackendError: saying what there is.
    """
    if plan.weight_bits is None or plan.weight_bits in supported:
        return
    raise BackendError(
        f"this backend quantises weights to {' or '.join(map(str, supported))} bits, not to "
        f"{plan.weight_bits}"
        if supported
        else "this backend does not quantise weights itself; convert the checkpoint with --bits, "
        "or use --backend torch"
    )


def check_tokens(tokens: Sequence[int], spec: ModelSpec, limit: int, what: str) -> None:
    """Refuse empty, too long or out-of-vocabulary input.

    Raises:
        BackendError: naming ``what`` and the problem.
    """
    if not tokens:
        raise BackendError(f"{what} is empty; it needs at least one token")
    if len(tokens) > limit:
        raise BackendError(_too_long(what, len(tokens), spec, limit))
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= spec.vocab_size:
        raise BackendError(
            f"{what} holds token id {low if low < 0 else high}, outside the vocabulary of "
            f"{spec.vocab_size}; use the model's own tokenizer"
        )


def check_scores(requests: Sequence[ScoreRequest], spec: ModelSpec, limit: int) -> None:
    """`check_tokens` for score requests; the last token is looked up and needs no position.

    Raises:
        BackendError: naming the request and the problem.
    """
    checked: tuple[int, ...] | None = None
    for index, request in enumerate(requests):
        what = f"score request {index}"
        if not request.context or not request.continuation:
            raise BackendError(f"{what} needs at least one context and one continuation token")
        if request.context is not checked:  # requests may share one
            check_tokens(request.context, spec, limit, what)
            checked = request.context
        check_tokens(request.continuation, spec, limit + 1, what)
        length = len(request.context) + len(request.continuation) - 1
        if length > limit:
            raise BackendError(_too_long(what, length, spec, limit))


def _too_long(what: str, length: int, spec: ModelSpec, limit: int) -> str:
    hint = _dual_chunk_hint(spec, limit)
    return f"{what} has {length} tokens, this model takes {limit}{hint}; shorten it"


def _limit(spec: ModelSpec, dual_chunk: bool) -> int:
    if spec.dual_chunk is not None and not dual_chunk:
        return min(spec.context_length, spec.dual_chunk.chunk_size + 1)
    return spec.context_length


def _dual_chunk_hint(spec: ModelSpec, limit: int) -> str:
    if spec.dual_chunk is None or limit != spec.dual_chunk.chunk_size + 1:
        return ""
    return " (longer inputs need dual chunk attention, which this backend lacks)"
