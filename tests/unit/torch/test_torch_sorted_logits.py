"""Draws from whole rows on the device are those of the sampler in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwen2kit import Sampling
from qwen2kit.backend.slots import BROKEN, Cut, Edit
from qwen2kit.engine.drawing import Block, draw, draw_rows
from qwen2kit.engine.request import Request
from qwen2kit.engine.sequence import start
from qwen2kit.generate.edit import pack_mask
from qwen2kit.generate.sampling import Sampler
from qwen2kit_torch.engine.sorted_logits import SortedLogits, logits_on_device

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]
PROMPT = [3, 3, 17, 5, 280]
KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 2.0, "top_k": 100},
    {"temperature": 0.7, "top_p": 0.95, "vocab_limit": 290},
    {"temperature": 1.3, "top_p": 0.999, "top_k": 1000},
    {"temperature": 10.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": ((3, 4.0), (9, -100.0)), "presence_penalty": -1.0},
]


def logits(count: int, width: int, seed: int, grid: float) -> np.ndarray:
    """float32 ``[count, width]``; a coarse ``grid`` makes ties."""
    values = np.random.default_rng(seed).standard_normal((count, width)) * 2
    return (np.round(values / grid) * grid if grid else values).astype(np.float32)


@pytest.mark.parametrize("grid", [0.0, 0.5, 8.0])
@pytest.mark.parametrize("device", DEVICES)
def test_the_samplers_tokens(device: str, grid: float) -> None:
    samplings = [Sampling(seed=index, **kind) for index, kind in enumerate(KINDS * 5)]
    mine, theirs = ([Sampler(each, PROMPT, 1) for each in samplings] for _ in range(2))
    allowed = np.zeros(300, dtype=bool)
    allowed[::7] = True
    for step in range(12):
        rows = logits(len(samplings), 300, step, grid)
        masks = [
            pack_mask(allowed) if index % 4 == step % 4 else None for index in range(len(rows))
        ]
        edits = [sampler.edit(mask) for sampler, mask in zip(mine, masks, strict=True)]
        order = list(reversed(range(len(rows))))
        found = SortedLogits(torch.from_numpy(rows).to(device)).draw(
            order, [edits[i] for i in order], [mine[i].cut() for i in order]
        )
        for token, index in zip(found, order, strict=True):
            assert token == theirs[index].draw(rows[index], theirs[index].edit(masks[index])).token
            mine[index].accept(token)


@pytest.mark.parametrize("device", DEVICES)
def test_shares_of_a_large_vocabulary(device: str) -> None:
    """Nearly equal logits, as an untrained model gives them: shortlists never suffice."""
    rows = logits(40, 151_936, 0, 0.0)
    samplers = [Sampler(Sampling(temperature=1.0, seed=index), [1]) for index in range(40)]
    expected = [s.fork().draw(row).token for s, row in zip(samplers, rows, strict=True)]
    found = draw_rows(SortedLogits(torch.from_numpy(rows).to(device)), samplers)
    assert [drawn.token for drawn in found] == expected
    assert len(set(expected)) == 40


def test_broken_rows_are_told() -> None:
    bad = torch.zeros(5, 40)
    bad[1, 5], bad[2, 5], bad[4, 39] = torch.nan, torch.inf, torch.nan
    bad[3] = -torch.inf
    edits = [Edit(limit=39)] * 5
    found = SortedLogits(bad).draw(range(5), edits, [Cut(top_k=3, top_p=0.5, point=0.99)] * 5)
    assert found == [19, BROKEN, BROKEN, BROKEN, 19]  # half of 39 equals


def test_the_engine_draws_alike_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.from_numpy(logits(len(KINDS), 5000, 1, 0.0))
    called: list[int] = []
    plain, sort = logits_on_device(rows), SortedLogits(rows)
    original = sort.draw

    def counted(*given: Any) -> list[int]:
        called.append(len(given[0]))
        return original(*given)

    monkeypatch.setattr(sort, "draw", counted)

    def blocks() -> list[Block]:
        requests = [Request(tuple(PROMPT), Sampling(**kind)) for kind in KINDS]
        return [Block(start(key, each, 100)) for key, each in enumerate(requests)]

    assert not isinstance(plain, SortedLogits)
    assert draw(plain, blocks()) == draw(sort, blocks())
    assert len(called) == 1
