"""Pipeline stages: which parameters live where.

Layers are dealt out in order, as equally as possible. The last stage also computes the head,
which costs as much as some layers, so when layers do not divide evenly the later stages are the
shorter ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import EMBED_TOKENS, FINAL_NORM, LM_HEAD, Param, schema


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of consecutive decoder layers.

    Attributes:
        index, count: this stage (from 0) and how many there are.
        layers: indices of its decoder layers.
    """

    index: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        """Whether it holds the embedding."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it holds the final norm and the head."""
        return self.index == self.count - 1

    def owns(self, spec: ModelSpec, param: Param) -> bool:
        """Whether ``param`` is needed here; a tied head needs the embedding once more."""
        if param.layer is not None:
            return param.layer in self.layers
        if param.name == EMBED_TOKENS:
            return self.first or (self.last and spec.tie_word_embeddings)
        assert param.name in (FINAL_NORM, LM_HEAD)
        return self.last


def stages(spec: ModelSpec, count: int) -> tuple[Stage, ...]:
    """``count`` stages of ``spec``; ``count`` must not exceed the number of layers."""
    share, longer = divmod(spec.num_hidden_layers, count)
    ends = [share * (i + 1) + min(i + 1, longer) for i in range(count)]
    starts = [0, *ends[:-1]]
    return tuple(
        Stage(i, count, range(start, end))
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


def stage_params(spec: ModelSpec, stage: Stage) -> tuple[Param, ...]:
    """The schema's parameters that ``stage`` holds, in schema order."""
    return tuple(param for param in schema(spec) if stage.owns(spec, param))
