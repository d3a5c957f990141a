"""Run the prompts through every implementation and compare all pairs.

One model is in memory at a time. Its logits go to memory-mapped files in a temporary folder, so
that a prompt of thousands of tokens times a vocabulary of 150 thousand costs disk and not memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qwen2kit.common_prefix import common_prefix
from qwen2kit.parity.layers import Divergence, first_divergence
from qwen2kit.parity.logit_files import LogitFiles
from qwen2kit.parity.metrics import LogitDelta, compare_logits, merge_deltas
from qwen2kit.parity.peers import Peer, PeerLoader
from qwen2kit.parity.prompts import Prompt
from qwen2kit.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GREEDY_PROMPT_TOKENS = 512
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """Greedy decoding of one prompt by two implementations.

    Attributes:
        common: length of the common prefix.
        length: length of the longer output.
        identical: whether both outputs are the same.
        gap: at the first difference, how far the first implementation prefers its token over
            the other's (difference of its logits); 0 if identical, infinite if one output is
            the other cut short. A gap within twice the logit tolerance is a tie that rounding
            may break either way.
    """

    common: int
    length: int
    identical: bool
    gap: float

    def to_dict(self) -> dict[str, int | float | bool | None]:
        """JSON values; an infinite gap becomes None."""
        return {
            "common": self.common,
            "length": self.length,
            "identical": self.identical,
            "gap": self.gap if isfinite(self.gap) else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PairResult:
    """Two implementations against each other.

    Attributes:
        first, second: their names.
        prompts: the logit difference per prompt.
        total: all prompts together.
        greedy: greedy decoding per prompt (prompts up to `GREEDY_PROMPT_TOKENS`).
        divergence: first diverging layer on the worst prompt; only if out of tolerance and if
            both implementations show their hidden states.
        passed: logits within tolerance, and greedy outputs equal but for ties.
    """

    first: str
    second: str
    prompts: dict[str, LogitDelta]
    total: LogitDelta
    greedy: dict[str, Greedy]
    divergence: Divergence | None
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        layers = self.divergence
        return {
            "first": self.first,
            "second": self.second,
            "passed": self.passed,
            "total": self.total.to_dict(),
            "prompts": {name: delta.to_dict() for name, delta in self.prompts.items()},
            "greedy": {name: run.to_dict() for name, run in self.greedy.items()},
            "first_divergence": None if layers is None else layers.where,
            "layers": None
            if layers is None
            else [value if isfinite(value) else None for value in layers.relative],
        }


def compare_all(
    checkpoint: Checkpoint,
    loaders: Sequence[PeerLoader],
    prompts: Sequence[Prompt],
    *,
    dtype: str = "float32",
    tolerance: float = 1e-3,
    greedy_tokens: int = 128,
    progress: Progress = lambda message: None,
) -> list[PairResult]:
    """Compare every pair of ``loaders`` on ``prompts``; at most one model is loaded at a time.

    Raises:
        Qwen2KitError: an implementation cannot load or run the model.
    """
    with TemporaryDirectory(prefix="qwen2kit-parity-") as folder:
        records = []
        for loader in loaders:
            progress(f"{loader.name}: loading")
            peer = loader.load(checkpoint, dtype)
            record = _Record(loader.name, Path(folder))
            for prompt in prompts:
                progress(f"{loader.name}: {prompt.name} ({len(prompt.tokens)} tokens)")
                record.run(peer, prompt, greedy_tokens, checkpoint)
            records.append(record)
            del peer
            gc.collect()
        pairs = []
        for first, second in combinations(records, 2):
            progress(f"comparing {first.name} with {second.name}")
            pairs.append(_compare(first, second, prompts, tolerance))
    by_name = {loader.name: loader for loader in loaders}
    return [
        pair if pair.passed else _diagnose(pair, by_name, checkpoint, prompts, dtype, progress)
        for pair in pairs
    ]


class _Record:
    """Everything one implementation said."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.greedy: dict[str, list[int]] = {}
        self._files = LogitFiles(folder / name)

    def run(self, peer: Peer, prompt: Prompt, count: int, checkpoint: Checkpoint) -> None:
        """Decode greedily, then compute the logits of prompt and output without a cache."""
        output: list[int] = []
        room = checkpoint.spec.context_length - len(prompt.tokens)
        if min(count, room) > 0 and len(prompt.tokens) <= GREEDY_PROMPT_TOKENS:
            stop = checkpoint.generation.stop_token_ids
            output = peer.greedy(prompt.tokens, min(count, room), stop)
            self.greedy[prompt.name] = output
        self._files.save(prompt.name, peer.logits([*prompt.tokens, *output]))

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """Memory-mapped logits of the prompt's tokens, then of the output's."""
        return self._files.load(prompt.name)


def _compare(
    first: _Record, second: _Record, prompts: Sequence[Prompt], tolerance: float
) -> PairResult:
    deltas: dict[str, LogitDelta] = {}
    greedy: dict[str, Greedy] = {}
    for prompt in prompts:
        a, b = first.logits(prompt), second.logits(prompt)
        length = len(prompt.tokens)
        deltas[prompt.name] = compare_logits(a[:length], b[:length])
        if prompt.name in first.greedy and prompt.name in second.greedy:
            outputs = first.greedy[prompt.name], second.greedy[prompt.name]
            greedy[prompt.name] = _compare_greedy(outputs, a[length - 1 :])
    within = all(delta.within(tolerance) for delta in deltas.values())
    ties = all(run.identical or run.gap <= 2 * tolerance for run in greedy.values())
    return PairResult(
        first=first.name,
        second=second.name,
        prompts=deltas,
        total=merge_deltas(list(deltas.values())),
        greedy=greedy,
        divergence=None,
        passed=within and ties,
    )


def _compare_greedy(outputs: tuple[list[int], list[int]], logits: NDArray[np.float32]) -> Greedy:
    ours, theirs = outputs
    common = common_prefix(ours, theirs)
    gap = 0.0
    if common < min(len(ours), len(theirs)):
        row = logits[common]
        gap = abs(float(row[ours[common]]) - float(row[theirs[common]]))
    elif len(ours) != len(theirs):
        gap = inf
    return Greedy(
        common=common,
        length=max(len(ours), len(theirs)),
        identical=ours == theirs,
        gap=gap,
    )


def _diagnose(
    pair: PairResult,
    loaders: dict[str, PeerLoader],
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    dtype: str,
    progress: Progress,
) -> PairResult:
    worst = max(prompts, key=lambda prompt: pair.prompts[prompt.name].max_abs)
    states = []
    for name in (pair.first, pair.second):
        progress(f"{name}: hidden states of {worst.name}")
        peer = loaders[name].load(checkpoint, dtype)
        states.append(peer.hidden_states(worst.tokens))
        del peer
        gc.collect()
    a, b = states
    if a is None or b is None:
        return pair
    return PairResult(
        first=pair.first,
        second=pair.second,
        prompts=pair.prompts,
        total=pair.total,
        greedy=pair.greedy,
        divergence=first_divergence(a, b, dtype=dtype),
        passed=False,
    )
