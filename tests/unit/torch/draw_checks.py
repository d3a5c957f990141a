"""Draws from whole rows on a device against the sampler in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2kit import Sampling
from qwen2kit.backend.slots import BROKEN, Cut, DrawingLogits, Edit
from qwen2kit.engine.drawing import draw_rows
from qwen2kit.generate.edit import pack_mask
from qwen2kit.generate.sampling import Sampler

Make = Callable[[Tensor], DrawingLogits]
PROMPT = [3, 3, 17, 5, 280]
KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.5, "top_k": 4, "top_p": 0.3},
    {"temperature": 2.0, "top_k": 100},
    {"temperature": 0.05, "top_k": 100, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.95, "vocab_limit": 290},
    {"temperature": 1.3, "top_p": 0.999, "top_k": 1000},
    {"temperature": 10.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": ((3, 4.0), (9, -100.0)), "presence_penalty": -1.0},
]


def logits(count: int, width: int, seed: int, grid: float, scale: float = 2) -> NDArray[np.float32]:
    """float32 ``[count, width]``; a coarse ``grid`` makes ties."""
    values = np.random.default_rng(seed).standard_normal((count, width)) * scale
    return (np.round(values / grid) * grid if grid else values).astype(np.float32)


def check_tokens(make: Make, grid: float, scale: float, repeats: int, steps: int) -> None:
    """Sequences of every kind, a quarter of them constrained, rows in another order."""
    samplings = [Sampling(seed=index, **kind) for index, kind in enumerate(KINDS * repeats)]
    mine, theirs = ([Sampler(each, PROMPT, 1) for each in samplings] for _ in range(2))
    allowed = np.zeros(300, dtype=bool)
    allowed[::7] = True
    packed = pack_mask(allowed)
    order = list(reversed(range(len(samplings))))
    for step in range(steps):
        rows = logits(len(samplings), 300, step, grid, scale)
        masks = [packed if index % 4 == step % 4 else None for index in order]
        edits = [mine[index].edit(mask) for index, mask in zip(order, masks, strict=True)]
        found = make(torch.from_numpy(rows)).draw(order, edits, [mine[i].cut() for i in order])
        for token, index, mask in zip(found, order, masks, strict=True):
            expected = theirs[index].draw(rows[index], theirs[index].edit(mask)).token
            assert token == expected, (samplings[index], step)
            mine[index].accept(token)


def check_unlike_dtypes(make: Make) -> None:
    """Rows in bfloat16 are drawn from as they are."""
    rows = torch.from_numpy(logits(8, 700, 3, 0.0)).bfloat16()
    samplers = [Sampler(Sampling(temperature=1.0, top_p=0.9, seed=i), [1]) for i in range(8)]
    pairs = list(zip(samplers, rows.float().numpy(), strict=True))
    edits, cuts = [s.edit() for s in samplers], [s.cut() for s in samplers]
    assert make(rows).draw(range(8), edits, cuts) == [s.draw(row).token for s, row in pairs]


def check_large_vocabulary(make: Make, rows: int, width: int) -> None:
    """Nearly equal logits, as an untrained model gives them: shortlists never suffice."""
    given = logits(rows, width, 0, 0.0)
    samplers = [Sampler(Sampling(temperature=1.0, seed=index), [1]) for index in range(rows)]
    expected = [s.fork().draw(row).token for s, row in zip(samplers, given, strict=True)]
    found = draw_rows(make(torch.from_numpy(given)), samplers)
    assert [drawn.token for drawn in found] == expected
    assert len(set(expected)) == rows


def check_broken(make: Make) -> None:
    """Rows that hold no numbers are told, and do no harm to others."""
    bad = torch.zeros(5, 40)
    bad[1, 5], bad[2, 5], bad[4, 39] = torch.nan, torch.inf, torch.nan
    bad[3] = -torch.inf
    edits = [Edit(limit=39)] * 5
    found = make(bad).draw(range(5), edits, [Cut(top_k=3, top_p=0.5, point=0.99)] * 5)
    assert found == [19, BROKEN, BROKEN, BROKEN, 19]  # half of 39 equals
