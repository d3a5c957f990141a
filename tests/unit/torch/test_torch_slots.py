"""Slots: equal to transformers, independent of other slots and of how tokens were divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.slots import BROKEN, Edit, Feed, PersistentSlots
from qwen2kit.errors import BackendError, WeightError
from tests.conftest import small_spec
from tests.unit.torch.peers import SPECS, TOKENS, continued, ours, theirs

torch = pytest.importorskip("torch")

RAGGED = [TOKENS[:9], TOKENS[3:4], TOKENS, TOKENS[5:14]]


def run(slots: Any, feeds: Sequence[Feed], steps: int) -> list[list[int]]:
    """Greedy ids by feed: one from the prompt's logits, the others from ``run_greedy``."""
    first = slots.feed(feeds).greedy(None)
    found = [[token] for token in first]
    ahead = slots.run_greedy(
        [
            Feed(feed.slot, feed.start + len(feed.tokens), (token,))
            for feed, token in zip(feeds, first, strict=True)
        ],
        None,
    )
    for _ in range(steps - 1):
        for row, token in zip(found, next(ahead), strict=True):
            row.append(token)
    ahead.close()
    return found


def alone(model: Any, prompt: list[int], steps: int) -> list[int]:
    slots = model.slots(1, len(prompt) + steps)
    found = run(slots, [Feed(0, 0, tuple(prompt))], steps)[0]
    slots.close()
    return found


@pytest.mark.parametrize("name", SPECS)
def test_greedy_matches_transformers(name: str) -> None:
    assert alone(ours(SPECS[name]), TOKENS, 40) == continued(theirs(SPECS[name]), TOKENS, 40)


@pytest.mark.parametrize("name", ["tied", "untied", "window"])
def test_slots_do_not_matter_to_each_other(name: str) -> None:
    model = ours(SPECS[name])
    slots = model.slots(6, 64)
    order = [5, 0, 2, 3]
    feeds = [Feed(slot, 0, tuple(prompt)) for slot, prompt in zip(order, RAGGED, strict=True)]
    together = run(slots, feeds, 24)
    assert together == [alone(model, prompt, 24) for prompt in RAGGED]
    # A slot is emptied and used again while the others go on.
    again = [
        Feed(0, 0, tuple(TOKENS[2:8])),
        *(
            Feed(slot, len(prompt) + 23, (row[-1],))
            for slot, prompt, row in zip(order, RAGGED, together, strict=True)
            if slot != 0
        ),
    ]
    mixed = slots.feed(again).greedy(None)
    assert mixed[0] == alone(model, TOKENS[2:8], 1)[0]
    assert mixed[1:] == [alone(model, RAGGED[i], 25)[-1] for i in (0, 2, 3)]


@pytest.mark.parametrize("name", ["tied", "window", "yarn"])
@pytest.mark.parametrize("budget", [2048, 7])
def test_division_into_feeds_and_passes_does_not_matter(
    name: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen2kit_torch.engine.eager.TOKENS_PER_PASS", budget)
    model = ours(SPECS[name])
    expected = model.logits(TOKENS)
    slots = model.slots(3, 32)
    found = [
        slots.feed([Feed(2, 0, tuple(TOKENS[:8]), wanted=8)]).rows(range(8)),
        slots.feed([Feed(2, 8, tuple(TOKENS[8:9]), wanted=0), Feed(1, 0, (7,))]).rows([]),
        slots.feed([Feed(1, 1, (3, 5)), Feed(2, 9, tuple(TOKENS[9:]), wanted=3)]).rows([1, 2, 3]),
    ]
    assert found[1].shape == (0, 199)
    np.testing.assert_allclose(found[0], expected[:8], atol=1e-4)
    np.testing.assert_allclose(found[2], expected[-3:], atol=1e-4)


@pytest.mark.parametrize("name", ["tied", "window"])
def test_cut_back_and_copied_slots_are_as_good_as_new(name: str) -> None:
    model = ours(SPECS[name])
    slots = model.slots(2, 48)
    run(slots, [Feed(0, 0, tuple(TOKENS))], 10)
    slots.copy(0, 1, 9)
    for slot in (1, 0):
        found = run(slots, [Feed(slot, 9, (1, 2, 3))], 12)
        assert found[0] == alone(model, [*TOKENS[:9], 1, 2, 3], 12)


def test_greedy_run_ends_with_the_slot() -> None:
    slots = ours(SPECS["tied"]).slots(2, 12)
    slots.feed([Feed(0, 0, tuple(TOKENS[:8])), Feed(1, 0, tuple(TOKENS[:3]))])
    steps = list(slots.run_greedy([Feed(0, 8, (1,)), Feed(1, 3, (1,))], None))
    assert len(steps) == 4


def test_saved_slots_go_on_as_if_never_saved() -> None:
    model = ours(SPECS["window"])
    slots: PersistentSlots = model.slots(2, 40)
    expected = run(slots, [Feed(0, 0, tuple(TOKENS))], 9)
    saved = list(slots.export(0, len(TOKENS)))
    assert [saved[0][0], saved[-1][0]] == ["layers.0.anchored_keys", "layers.2.values"]
    assert saved[0][1].shape == (2, len(TOKENS), 16)
    fresh = model.slots(2, 32)
    fresh.restore(1, iter(saved))
    found = run(fresh, [Feed(1, len(TOKENS) - 1, (TOKENS[-1],))], 9)
    assert found == expected
    with pytest.raises(WeightError, match=r"lacks layers.2.values"):
        fresh.restore(0, iter(saved[:-1]))
    with pytest.raises(WeightError, match="does not fit"):
        model.slots(1, 8).restore(0, iter(saved))


def test_shortlist_is_what_numpy_makes_of_the_rows() -> None:
    slots = ours(SPECS["untied"]).slots(1, 32)
    logits = slots.feed([Feed(0, 0, tuple(TOKENS), wanted=4)])
    allowed = np.zeros(7, np.uint32)
    allowed[[0, 3]] = 0xF0F0F0F1
    edits = [
        Edit(),
        Edit(limit=150, temperature=0.7),
        Edit(ids=np.array([3, 190, 7]), scale=np.array([2, 0.5, 1], np.float32),
             shift=np.array([1, -2, 30], np.float32), temperature=2.0),
        Edit(limit=190, allowed=allowed, ids=np.array([0]), shift=np.array([9], np.float32)),
    ]  # fmt: skip
    found = logits.shortlist(20, edits)
    for index, edit in enumerate(edits):
        raw = logits.rows([index])[0].astype(np.float64)
        raw[199 if edit.limit is None else edit.limit :] = -np.inf
        scores = raw.copy()
        for position, token in enumerate([] if edit.ids is None else edit.ids):
            scale = 1 if edit.scale is None else edit.scale[position]
            value = scores[token] / scale if scores[token] > 0 else scores[token] * scale
            scores[token] = value + edit.shift[position]
        if edit.allowed is not None:
            scores[[i for i in range(199) if not edit.allowed[i // 32] >> (i % 32) & 1]] = -np.inf
        order = np.argsort(-scores, kind="stable")[:20]
        np.testing.assert_array_equal(found.ids[index], order)
        np.testing.assert_allclose(found.scores[index], scores[order], rtol=1e-5)
        np.testing.assert_allclose(found.raw[index], raw[order], rtol=1e-6)
        expected = np.logaddexp.reduce(scores / edit.temperature)
        assert found.total[index] == pytest.approx(expected, abs=1e-5)
        assert found.raw_total[index] == pytest.approx(np.logaddexp.reduce(raw), abs=1e-5)


def test_logits_that_are_no_numbers_are_told() -> None:
    from qwen2kit_torch.engine.logits import DeviceLogits

    bad = torch.zeros(2, 40)
    bad[1, 5] = torch.nan
    assert DeviceLogits(bad).greedy(None) == [0, BROKEN]
    assert DeviceLogits(bad).greedy(5) == [0, 0]
    for size in (4, 40):
        assert DeviceLogits(bad).shortlist(size, [Edit(), Edit()]).sound == [True, False]
    for value in (torch.inf, -torch.inf):
        nothing = DeviceLogits(torch.full((1, 8), value))
        assert nothing.greedy(None) == [BROKEN]
        assert nothing.shortlist(4, [Edit()]).sound == [False]


def test_slots_are_refused_beyond_limit_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(small_spec(max_position_embeddings=24))
    for count, capacity in ((0, 8), (1, 25), (1, 0)):
        with pytest.raises(BackendError, match="1 to 24 tokens"):
            model.slots(count, capacity)
    one = 2 * 3 * 2 * 16 * 4 * 24
    monkeypatch.setattr("qwen2kit_torch.engine.storage.free_memory", lambda device: one * 4)
    assert model.slots(100, 24).count == 3
    monkeypatch.setattr("qwen2kit_torch.engine.storage.free_memory", lambda device: one)
    with pytest.raises(BackendError, match="ask for shorter sequences"):
        model.slots(1, 24)


def test_grad_mode_stays_the_callers() -> None:
    ahead = ours(SPECS["tied"]).slots(1, 8).run_greedy([Feed(0, 0, (1,))], None)
    for _ in ahead:
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_a_training_model_continues_with_its_present_weights() -> None:
    from qwen2kit.backend.plan import TrainPlan

    spec = SPECS["tied"]
    model = ours(spec, train=TrainPlan())
    assert alone(model, TOKENS, 12) == alone(ours(spec), TOKENS, 12)


def test_a_device_without_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(SPECS["tied"])
    slots = model.slots(1, 16)

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model.module, "head", full)
    with pytest.raises(BackendError, match="out of memory while generating; use fewer slots"):
        slots.feed([Feed(0, 0, (1, 2))])
