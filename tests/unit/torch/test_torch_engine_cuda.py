"""Slots on CUDA, their graphs and kernels, against transformers and against the plain network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen2kit import Sampling
from qwen2kit.backend.slots import BROKEN, Feed
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.request import Request
from tests.unit.torch.peers import SPECS, TOKENS, continued, ours, theirs
from tests.unit.torch.test_torch_slots import RAGGED, alone, run

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_cuda(name: str, **plan: Any) -> Any:
    return ours(SPECS[name], device="cuda", **({"dtype": "float32"} | plan))


@pytest.mark.parametrize("name", SPECS)
def test_greedy_matches_transformers_in_float32(name: str) -> None:
    model = on_cuda(name)
    assert type(model.slots(1, 8)).__name__ == "GraphSlots"
    assert alone(model, TOKENS, 40) == continued(theirs(SPECS[name]), TOKENS, 40)


@pytest.mark.parametrize("name", ["tied", "untied", "window"])
def test_slots_do_not_matter_to_each_other(name: str) -> None:
    model, plain = on_cuda(name), ours(SPECS[name])
    slots = model.slots(6, 64)
    order = [5, 0, 2, 3]
    feeds = [Feed(slot, 0, tuple(prompt)) for slot, prompt in zip(order, RAGGED, strict=True)]
    together = run(slots, feeds, 24)
    assert together == [alone(plain, prompt, 24) for prompt in RAGGED]
    assert together == [alone(model, prompt, 24) for prompt in RAGGED]


@pytest.mark.parametrize("name", ["tied", "window", "yarn"])
@pytest.mark.parametrize("first", [1, 9, 63, 64, 65, 130])
def test_any_division_into_feeds_is_float32_exact(name: str, first: int) -> None:
    model = on_cuda(name)
    long = (TOKENS * 8)[:150]
    expected = ours(SPECS[name]).logits(long)
    slots = model.slots(3, 160)
    wanted = min(first, 5)
    found = slots.feed([Feed(2, 0, tuple(long[:first]), wanted)]).rows(range(wanted))
    np.testing.assert_allclose(found, expected[first - wanted : first], atol=1e-4)
    # A long piece and single tokens of other slots at once.
    rest = tuple(long[first:])
    found = slots.feed([Feed(1, 0, (5,)), Feed(2, first, rest, 3), Feed(0, 0, (7,))])
    np.testing.assert_allclose(found.rows([1, 2, 3]), expected[-3:], atol=1e-4)
    single = ours(SPECS[name]).logits([7])[0]
    np.testing.assert_allclose(found.rows([4])[0], single, atol=1e-4)


def test_cut_back_copied_and_saved_slots_are_as_good_as_new() -> None:
    model = on_cuda("window")
    slots = model.slots(3, 48)
    run(slots, [Feed(0, 0, tuple(TOKENS))], 10)
    slots.copy(0, 1, 9)
    slots.restore(2, iter(list(slots.export(0, 9))))
    expected = alone(ours(SPECS["window"]), [*TOKENS[:9], 1, 2, 3], 12)
    for slot in (1, 2, 0):
        assert run(slots, [Feed(slot, 9, (1, 2, 3))], 12)[0] == expected


def test_greedy_run_ends_with_the_slot_and_obeys_the_limit() -> None:
    slots = on_cuda("tied").slots(2, 12)
    slots.feed([Feed(0, 0, tuple(TOKENS[:8])), Feed(1, 0, tuple(TOKENS[:3]))])
    steps = list(slots.run_greedy([Feed(0, 8, (1,)), Feed(1, 3, (1,))], 50))
    assert len(steps) == 4
    assert max(token for ids in steps for token in ids) < 50
    again = list(slots.run_greedy([Feed(0, 8, (1,)), Feed(1, 3, (1,))], 50))
    assert again == steps


def test_prepared_slots_give_the_same_and_capture_nothing_later() -> None:
    def sampled(*, prepare: bool) -> list[tuple[int, ...]]:
        model = on_cuda("tied")
        with Engine(model, slots=5, capacity=120) as engine:
            if prepare:
                engine.prepare()
                known = dict(engine._slots._steps)  # type: ignore[attr-defined]
                assert set(known) == {(1 << n, False) for n in range(7)} | {
                    (1 << n, True) for n in range(4)
                }
                passes = dict(engine._slots._passes._passes)  # type: ignore[attr-defined]
                assert set(passes) == {*range(64, 513, 64), *range(768, 2305, 256)}
                graphs = [one._graph for one in passes.values()]
                assert None not in graphs
            texts: dict[int, list[int]] = {}
            for seed, length in enumerate((3, 70, 90, 5, 8)):
                how = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=20, seed=seed)
                texts[engine.submit(Request(tuple(TOKENS * 9)[:length], how))] = []
            while engine.busy:
                for event in engine.step():
                    texts[event.prompt].append(event.token)
            if prepare:
                assert engine._slots._steps == known  # type: ignore[attr-defined]
                assert engine._slots._passes._passes == passes  # type: ignore[attr-defined]
                assert [one._graph for one in passes.values()] == graphs
            return [tuple(text) for text in texts.values()]

    assert sampled(prepare=True) == sampled(prepare=False)


@pytest.mark.parametrize("name", ["tied", "window"])
def test_requests_that_come_and_go_are_as_if_alone(name: str) -> None:
    """Prompts are read while others speak, in passes that are captured when they repeat."""
    model, plain = on_cuda(name), ours(SPECS[name])
    prompts = [(TOKENS * 12)[n % 7 : n % 7 + 9 + 37 * n % 190] for n in range(24)]
    with Engine(model, slots=5, capacity=240) as engine:
        texts: dict[int, list[int]] = {
            engine.submit(Request(tuple(prompt), Sampling(max_new_tokens=5 + 3 * n % 11))): []
            for n, prompt in enumerate(prompts)
        }
        while engine.busy:
            for event in engine.step():
                texts[event.prompt].append(event.token)
        passes = engine._slots._passes._passes.values()  # type: ignore[attr-defined]
        assert sum(one._graph is not None for one in passes) > 1
    for n, (prompt, text) in enumerate(zip(prompts, texts.values(), strict=True)):
        assert tuple(text) == tuple(alone(plain, prompt, 5 + 3 * n % 11))


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_what_the_device_draws_ahead_is_what_a_sampler_draws(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy rows, penalties and every cut together, longer than points are set for at a time."""
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
        {},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 1.5, "frequency_penalty": 0.4, "vocab_limit": 150},
    ]
    model = on_cuda("tied")

    def texts(*, ahead: bool) -> list[list[int]]:
        if not ahead:
            monkeypatch.setattr("qwen2kit.engine.engine.can_run_ahead", lambda *_: False)
        found: dict[int, list[int]] = {}
        with Engine(model, slots=rows, capacity=160) as engine:
            for row in range(rows):
                how = Sampling(max_new_tokens=40 + row, seed=row, **kinds[(row + 1) % len(kinds)])
                prompt = tuple(TOKENS[row % 7 :])
                found[engine.submit(Request(prompt, how))] = []
            while engine.busy:
                for event in engine.step():
                    found[event.prompt].append(event.token)
        return list(found.values())

    assert texts(ahead=True) == texts(ahead=False)


@pytest.mark.parametrize("rows", [1, 2])
def test_logits_that_are_no_numbers_are_told(rows: int) -> None:
    model = on_cuda("untied")
    model.module.model.norm.weight.detach()[3] = torch.nan
    slots = model.slots(rows, 12)
    feeds = [Feed(slot, 0, (1,)) for slot in range(rows)]
    assert slots.feed(feeds).greedy(None) == [BROKEN] * rows
    assert next(slots.run_greedy(feeds, None)) == [BROKEN] * rows


def test_bfloat16_agrees_with_itself_however_it_is_fed() -> None:
    model = on_cuda("tied", dtype="bfloat16")
    exact = ours(SPECS["tied"]).logits(TOKENS)
    slots = model.slots(2, 32)
    slots.feed([Feed(0, 0, tuple(TOKENS[:-1]))])
    stepped = slots.feed([Feed(0, len(TOKENS) - 1, (TOKENS[-1],))]).rows([0])[0]
    at_once = slots.feed([Feed(1, 0, tuple(TOKENS * 1))]).rows([0])[0]
    for found in (stepped, at_once):
        assert np.abs(found - exact[-1]).max() < 0.15


def test_new_weights_are_used_after_loading_again() -> None:
    from tests.conftest import random_weights

    model = on_cuda("tied")
    alone(model, TOKENS, 3)
    fresh = random_weights(SPECS["tied"], seed=5)
    model.load(fresh)
    assert alone(model, TOKENS, 20) == alone(ours(SPECS["tied"], fresh), TOKENS, 20)


def test_joined_weights_are_held_once_and_exported() -> None:
    from tests.conftest import random_weights

    model = on_cuda("untied")
    before = torch.cuda.memory_allocated()
    slots = model.slots(1, 8)
    slots.close()
    del slots
    assert torch.cuda.memory_allocated() <= before * 1.05 + (1 << 20)
    source = random_weights(SPECS["untied"])
    for name, tensor in model.export():
        np.testing.assert_array_equal(tensor.float32(), source.read(name).float32())


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32)])
def test_packed_weights_are_read_exactly(bits: int, group: int) -> None:
    model = on_cuda("untied", weight_bits=bits, weight_group_size=group)
    plain = ours(SPECS["untied"], weight_bits=bits, weight_group_size=group)
    assert model.module.model.layers[0].mlp.gate_proj.weight.dtype == torch.int32
    expected = plain.logits(TOKENS)
    slots = model.slots(3, 32)
    slots.feed([Feed(0, 0, tuple(TOKENS[:-4]))])
    for rows in (1, 3):
        feed = Feed(0, len(TOKENS) - 4, tuple(TOKENS[-4 : -4 + rows]), rows)
        found = slots.feed([feed]).rows(range(rows))
        np.testing.assert_allclose(found, expected[-4 : -4 + rows], atol=1e-4)
    assert alone(model, TOKENS, 20) == alone(plain, TOKENS, 20)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("steps", ["bfloat16", "float16", "float32"])
def test_packed_products_are_those_of_the_expanded_matrix_whatever_the_other_rows(
    bits: int, steps: str
) -> None:
    from qwen2kit_torch.engine.packed_products import product
    from qwen2kit_torch.quantized import quantize

    torch.manual_seed(0)
    weight = torch.randn(1000, 2048, device="cuda", dtype=getattr(torch, steps))
    matrix = quantize(weight, bits=bits, group=64)
    x = torch.randn(64, 2048, device="cuda").bfloat16()
    expected = x.float() @ matrix.dense(torch.bfloat16).float().t()
    found = {}
    for rows in (2, 16, 17, 64):
        out = found[rows] = torch.empty(rows, 1000, device="cuda", dtype=torch.bfloat16)
        product(x[:rows], matrix, out)
        torch.testing.assert_close(out.float(), expected[:rows], atol=0.5, rtol=0.01)
    assert torch.equal(found[16][:2], found[2])  # the kernel is the same for up to 16


@pytest.mark.parametrize("bits", [4, 8])
def test_several_launches_share_scratch(bits: int) -> None:
    """64 rows and then 20, whose ranges of inputs are more."""
    from qwen2kit_torch.engine.packed_products import product, scratch_for
    from qwen2kit_torch.quantized import quantize

    torch.manual_seed(0)
    weight = torch.randn(896, 4864, device="cuda", dtype=torch.bfloat16)
    matrix = quantize(weight, bits=bits, group=64)
    x = torch.randn(84, 4864, device="cuda").bfloat16()
    scratch = scratch_for([matrix], 84, x.itemsize)
    assert scratch is not None
    out = torch.empty(84, 896, device="cuda", dtype=torch.bfloat16)
    product(x, matrix, out, scratch=scratch)
    expected = x.float() @ matrix.dense(torch.bfloat16).float().t()
    torch.testing.assert_close(out.float(), expected, atol=0.5, rtol=0.01)
    assert not scratch.arrived.any()
