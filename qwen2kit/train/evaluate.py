"""Held-out loss and exact match of a model that is being trained."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

from qwen2kit.backend.protocol import TrainableModel
from qwen2kit.config.data_tree import EmbeddedData
from qwen2kit.config.tree import RunConfig
from qwen2kit.data.embedded import Question, generate
from qwen2kit.data.loader import Loader
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.train.exact_match import exact_match


class Evaluator:
    """Measures what the recipe asks for; ``measure`` gives an empty dict if that is nothing."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, held_out: Loader | None) -> None:
        self._tokenizer = tokenizer
        self._held_out = held_out
        self._max_rows = config.eval.max_rows
        self._questions: tuple[Question, ...] = ()
        if isinstance(config.data, EmbeddedData) and config.eval.questions:
            self._questions = tuple(generate(config.data.seed, config.eval.questions, True))

    def measure(self, model: TrainableModel, go_on: Callable[[], None]) -> dict[str, Any]:
        """``loss`` in nats per supervised token (None if not finite), ``exact_match`` from 0 to 1
        (and by kind).

        Args:
            go_on: called before each batch; what it raises ends the measurement.
        """
        figures: dict[str, Any] = {}
        if self._held_out is not None:
            loss = self._loss(model, self._held_out, go_on)
            figures["loss"] = loss if isfinite(loss) else None
        if self._questions:
            result = exact_match(model, self._tokenizer, self._questions, go_on=go_on)
            figures["exact_match"] = result.score
            figures["questions"] = result.total
            figures["by_kind"] = {kind: list(score) for kind, score in result.by_kind.items()}
        return figures

    def _loss(self, model: TrainableModel, loader: Loader, go_on: Callable[[], None]) -> float:
        total, tokens = 0.0, 0
        for batch in loader.first_rows(self._max_rows):
            go_on()
            metrics = model.loss(batch)
            total += metrics.loss * metrics.supervised_tokens
            tokens += metrics.supervised_tokens
        return total / max(1, tokens)
