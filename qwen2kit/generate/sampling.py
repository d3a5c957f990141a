"""Sampling settings and the one sampler every backend's logits go through.

Filtering and drawing happen here, in NumPy, so equal logits and equal seeds give equal text on
every backend. Order of operations is transformers': repetition penalty, the other penalties and
biases, constraint, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, Literal, NamedTuple

from qwen2kit.backend.slots import Course, Cut, Edit, Shortlist
from qwen2kit.errors import ConfigError
from qwen2kit.generate.edit import apply_edit
from qwen2kit.generate.inverse_cdf import Head, locate, log_sum_exp, most_likely
from qwen2kit.generate.penalties import Changes
from qwen2kit.generate.whole_row import draw_from_row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHORTLIST = 64
_LONGEST_SHORTLIST = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: upper bound on generated tokens (the stop token counts).
        stop_token_ids: generation ends with any of these ids; the id is emitted last.
        temperature: 0 means greedy.
        top_k: keep the k most likely tokens (and ties with the k-th); 0 keeps all.
        top_p: keep the smallest set whose probability reaches p; 1 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of every id seen in
            prompt or output (CTRL, arXiv 1909.05858); 1 is off.
        presence_penalty: subtracted from the logits of every id generated so far.
        frequency_penalty: the same, times how often it was (both as OpenAI's API defines them).
        logit_bias: ``(id, added to its logit)``, distinct ids.
        seed: the draw for output ``i`` of prompt ``j`` depends on (seed, j, i) only.
        vocab_limit: ids at or above it (untrained padding rows) are never produced.
        logprobs: report the log-probability of each emitted token (full softmax, before
            penalties and filtering).
        top_logprobs: report the same of that many most likely tokens, 0 to 64.

    Raises:
        ConfigError: a value is outside its range.
    """

    max_new_tokens: int = 512
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    vocab_limit: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name, (valid, rule) in self._rules().items():
            if not valid:
                raise ConfigError(f"{name} must {rule}, got {getattr(self, name)}")

    def _rules(self) -> dict[str, tuple[bool, str]]:
        return {
            "max_new_tokens": (self.max_new_tokens >= 1, "be at least 1"),
            "temperature": (0 <= self.temperature < inf, "not be negative"),
            "top_k": (self.top_k >= 0, "not be negative"),
            "top_p": (0 < self.top_p <= 1, "be in (0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < inf, "be positive"),
            "presence_penalty": (isfinite(self.presence_penalty), "be finite"),
            "frequency_penalty": (isfinite(self.frequency_penalty), "be finite"),
            "logit_bias": (self._is_bias_valid(), "hold finite numbers for distinct token ids"),
            "seed": (0 <= self.seed < 1 << 64, "be between 0 and 2**64 - 1"),
            "vocab_limit": (self.vocab_limit is None or self.vocab_limit >= 1, "be at least 1"),
            "top_logprobs": (0 <= self.top_logprobs <= _SHORTLIST, f"be 0 to {_SHORTLIST}"),
        }

    def _is_bias_valid(self) -> bool:
        ids = {token for token, bias in self.logit_bias if token >= 0 and isfinite(bias)}
        return len(ids) == len(self.logit_bias)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is a bare argmax, which a backend may take on its device."""
        return self.temperature == 0 and not (self.changes_logits or self.reports)

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases change logits before the temperature does."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.logit_bias)
        )

    @property
    def reports(self) -> bool:
        """Whether log-probabilities are wanted."""
        return self.logprobs or self.top_logprobs > 0

    @property
    def shortlist_size(self) -> int:
        """How many of the most likely tokens are worth fetching before a whole row is."""
        if _SHORTLIST <= self.top_k < _LONGEST_SHORTLIST:
            return 1 << self.top_k.bit_length()
        return _SHORTLIST

    def finish_reason(self, token: int, left: int) -> Literal["stop", "length"] | None:
        """Why a sequence ends with ``token``, ``left`` more being allowed; None if it goes on."""
        if token in self.stop_token_ids:
            return "stop"
        return "length" if left == 0 else None


class Drawn(NamedTuple):
    """One token drawn.

    Attributes:
        token: the id.
        logprob: its natural-log probability, if asked for.
        top: the most likely ids and theirs, as many as asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws tokens for one sequence.

    Args:
        sampling: the settings.
        prompt: prompt ids (needed by the repetition penalty).
        stream: index of the prompt in its batch; separates the random streams.

    Attributes:
        sampling: the settings.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], stream: int = 0) -> None:
        self.sampling = sampling
        self._drawn = 0
        self._points = _Points(sampling.seed, stream)
        self._plain = Edit(limit=sampling.vocab_limit, temperature=sampling.temperature)
        self._changes = Changes(sampling, prompt) if sampling.changes_logits else None

    def fork(self) -> Sampler:
        """A sampler in the same state, which draws what this one would and leaves it alone."""
        twin = object.__new__(Sampler)
        twin.sampling, twin._drawn = self.sampling, self._drawn
        twin._points, twin._plain = self._points, self._plain
        twin._changes = None if self._changes is None else self._changes.copy()
        return twin

    def edit(self, allowed: NDArray[np.uint32] | None = None) -> Edit:
        """What happens to the logits before the next draw.

        Args:
            allowed: the constraint's packed mask, see `Edit`.
        """
        if self._changes is None and allowed is None:
            return self._plain
        return Edit(
            limit=self._plain.limit,
            temperature=self._plain.temperature,
            allowed=allowed,
            **({} if self._changes is None else self._changes.arrays()),
        )

    def edits(self, ahead: Sequence[int]) -> list[Edit]:
        """`edit` for the next draw, and for those after it if they give ``ahead``."""
        if self._changes is None:
            return [self._plain] * (len(ahead) + 1)
        twin, found = self.fork(), [self.edit()]
        for token in ahead:
            twin.accept(token)
            found.append(twin.edit())
        return found

    def draw(self, logits: NDArray[np.float32], edit: Edit | None = None) -> Drawn:
        """The next token from a whole row.

        Args:
            logits: float32 ``[vocab]`` of the last position; not modified.
            edit: what `edit` gave for this draw, if it was called already.

        Raises:
            BackendError: the logits hold NaN, or nothing finite to choose from.
        """
        edit = edit or self.edit()
        scores = apply_edit(logits, edit)[: edit.limit]
        token = draw_from_row(scores, self.sampling, self._point)
        self.accept(token)
        return self._report(token, logits[: edit.limit]) if self.sampling.reports else Drawn(token)

    def draw_short(self, shortlist: Shortlist, head: Head, row: int, edit: Edit) -> Drawn | None:
        """The token that `draw` would give, if row ``row`` of ``shortlist`` tells; else None, and
        nothing has been drawn.

        Args:
            shortlist: of at least `Sampling.shortlist_size`.
            head: of that row, see `heads_of`.
            row: which one.
            edit: what it was made with.
        """
        sampling = self.sampling
        if sampling.top_logprobs and (edit.ids is not None or edit.allowed is not None):
            return None
        place = locate(head, sampling, self._point)
        if place is None:
            return None
        token = head.ids[place]
        self.accept(token)
        if not sampling.reports:
            return Drawn(token)
        ids = shortlist.ids[row].tolist()
        logprobs = (shortlist.raw[row].astype("float64") - shortlist.raw_total[row]).tolist()
        count = min(sampling.top_logprobs, int((shortlist.scores[row] > -inf).sum()))
        top = tuple(zip(ids[:count], logprobs[:count], strict=True))
        return Drawn(token, logprobs[ids.index(token)], top)

    def cut(self, ahead: int = 0) -> Cut:
        """Where the draw after ``ahead`` others cuts its row."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return Cut()
        point = self._points[self._drawn + ahead]
        return Cut(top_k=sampling.top_k, top_p=sampling.top_p, point=point)

    def course(self) -> Course:
        """How all tokens from the next one on are drawn, biases and reports left out."""
        sampling, changes, points, drawn = self.sampling, self._changes, self._points, self._drawn
        return Course(
            limit=sampling.vocab_limit,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            heard=() if changes is None else changes.heard,
            said={} if changes is None else changes.said,
            points=lambda first, count: points.some(drawn + first, count),
        )

    def accept(self, token: int) -> None:
        """Go on as if ``token`` had been drawn."""
        self._drawn += 1
        if self._changes is not None:
            self._changes.count(token)

    @property
    def _point(self) -> float:
        return self._points[self._drawn] if self.sampling.temperature > 0 else 0.0

    def _report(self, token: int, raw: NDArray[np.float32]) -> Drawn:
        import numpy as np

        values = raw.astype(np.float64)
        values -= log_sum_exp(values)
        ids = most_likely(raw, self.sampling.top_logprobs)
        top = tuple((token, float(values[token])) for token in ids)
        return Drawn(token, float(values[token]), top)


class _Points:
    """The random numbers of one stream, uniform in [0, 1), by index; forks share them."""

    def __init__(self, seed: int, stream: int) -> None:
        self._key = [seed, stream]
        self._known: list[float] = []
        self._random: np.random.Generator | None = None

    def __getitem__(self, index: int) -> float:
        while index >= len(self._known):
            if self._random is None:
                import numpy as np

                self._random = np.random.Generator(np.random.Philox(key=self._key))
            self._known.extend(self._random.random(64).tolist())
        return self._known[index]

    def some(self, first: int, count: int) -> list[float]:
        """Those from ``first`` on."""
        if count:
            self[first + count - 1]
        return self._known[first : first + count]
