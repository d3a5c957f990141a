"""The decoding step's Triton kernels against the plain network (`test_torch_interpreted`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.slots import Feed
from qwen2kit.spec.model import RoPESpec
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.spec.schema import schema_by_name
from qwen2kit.weights.source import MemorySource
from qwen2kit.weights.tensor import from_float32
from tests.conftest import random_weights, small_spec
from tests.unit.torch.peers import SPECS, TOKENS, ours
from tests.unit.torch.stepped import Stepped

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

# The interpreter takes milliseconds for every program: one layer where one is enough.
KINDS = {
    "tied": small_spec(num_hidden_layers=2),
    "untied": small_spec(num_hidden_layers=1, tied=False),
    "wide": small_spec(hidden_size=192, intermediate_size=328, vocab_size=517, num_hidden_layers=1),
    "multi-head": small_spec(num_key_value_heads=4, num_hidden_layers=1),
    "window": SPECS["window"],
    "yarn": SPECS["yarn"],
}


@pytest.mark.parametrize(
    ("name", "rows", "anchored"),
    [
        ("tied", 1, True),
        ("window", 1, False),
        ("wide", 1, False),
        ("multi-head", 1, True),
        ("yarn", 2, True),
        ("untied", 2, False),
    ],
)
def test_steps_continue_what_the_network_began(name: str, rows: int, anchored: bool) -> None:
    model = ours(KINDS[name])
    long = TOKENS * 5
    expected = model.logits(long)
    slots = Stepped(model, 3, len(long), rows, anchored=anchored)
    slots.eager.feed([Feed(2, 0, tuple(long[:70]))])
    for position in range(70, 72 if name == "tied" else 71):
        found = slots.run([(long[position], 2, position)])
        np.testing.assert_allclose(found[0], expected[position], atol=1e-4)
        token, _, moved = slots.step.rows[:, 0].tolist()
        assert (token, moved) == (int(expected[position].argmax()), position + 1)
    # The network goes on from the keys that the step has stored.
    after = slots.eager.feed([Feed(2, position + 1, tuple(long[position + 1 :]))]).rows([0])
    np.testing.assert_allclose(after[0], expected[-1], atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_large_key_biases_cost_anchored_keys_no_digits(rows: int) -> None:
    """Biases of up to 200 in dimensions that turn slowly, as Qwen2 has them."""
    spec = small_spec(num_hidden_layers=1, rope=RoPESpec(rope_theta=1e6))
    tensors = {}
    for name, value in ((name, random_weights(spec).read(name)) for name in schema_by_name(spec)):
        values = value.float32()
        if name.endswith("k_proj.bias"):
            heads = values.reshape(-1, 2, 8)
            heads[:, :, 6:] += np.random.default_rng(1).uniform(-200, 200, heads[:, :, 6:].shape)
        tensors[name] = from_float32(values, "float32")
    weights = MemorySource(tensors)
    exact = ReferenceModel(spec, weights).logits(TOKENS)[-1]
    gaps = []
    for anchored in (True, False):
        slots = Stepped(ours(spec, weights), 1, 32, rows, anchored=anchored)
        slots.eager.feed([Feed(0, 0, tuple(TOKENS[:-1]))])
        found = slots.run([(TOKENS[-1], 0, len(TOKENS) - 1)])[0]
        gaps.append(np.abs(found - exact).max())
    assert gaps[0] < 1e-5
    assert gaps[0] < gaps[1] / 2


def test_rows_of_one_slot_see_each_other_in_order_and_no_other_slot() -> None:
    model = ours(KINDS["window"])
    other = TOKENS[::-1]
    slots = Stepped(model, 3, 40, 8)
    slots.eager.feed([Feed(0, 0, tuple(TOKENS[:9])), Feed(1, 0, tuple(other[:4]))])
    rows = [(TOKENS[i], 0, i) for i in range(9, 14)] + [(other[4], 1, 4)]
    found = slots.run(rows)
    np.testing.assert_allclose(found[:5], model.logits(TOKENS)[9:14], atol=1e-4)
    np.testing.assert_allclose(found[5], model.logits(other)[4], atol=1e-4)


def test_ties_limits_and_nonsense_in_the_choice() -> None:
    model = ours(KINDS["untied"])
    for rows in (1, 4):
        slots = Stepped(model, 1, 8, rows)
        logits = slots.run([(5, 0, 0)])[0]
        limit = int(logits.argmax())
        slots.step.limit.fill_(limit)
        slots.run([(5, 0, 0)])
        assert slots.step.rows[0, 0] == logits[:limit].argmax()
    weight = model.module.lm_head.weight.detach()
    weight[11] = weight[60] = weight[int(logits.argmax())]
    for rows in (1, 4):
        slots = Stepped(model, 1, 8, rows)
        slots.run([(5, 0, 0)])
        assert slots.step.history[0, 0] == 11
    weight[3] = torch.nan
    for rows in (1, 4):
        slots = Stepped(model, 1, 8, rows)
        slots.run([(5, 0, 0)])
        assert slots.step.history[0, 0] == -1


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_ranges_of_keys_join_to_plain_attention(length: int) -> None:
    from qwen2kit_torch.engine.kernels import attention

    torch.manual_seed(0)
    heads, kv_heads, size, splits = 6, 2, 16, 4
    queries = torch.randn(2, heads, size)
    keys, values = torch.randn(2, 3, kv_heads, 256, size)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    positions = torch.tensor([length - 1, 100], dtype=torch.int32)
    out = torch.full((2, heads * size), torch.nan)
    parts = torch.empty(2, kv_heads, splits, 16, size)
    weights = torch.empty(2, kv_heads, splits, 16, 2)
    arrived = torch.zeros(2, kv_heads, dtype=torch.int32)
    for window, spread in ((0, 2), (50, 2), (0, 16)):
        attention.attend[(splits, kv_heads, 2)](
            queries, keys, values, slots, positions, out, parts, weights, arrived, 256,
            size**-0.5, heads, kv_heads, size, window, splits, spread, 16, 16, False,
        )  # fmt: skip
        for row in range(2):
            end = int(positions[row]) + 1
            begin = max(0, end - window) if window else 0
            expected = torch.nn.functional.scaled_dot_product_attention(
                queries[row, None, :, None],
                keys[slots[row], None, :, begin:end],
                values[slots[row], None, :, begin:end],
                enable_gqa=True,
            )
            torch.testing.assert_close(out[row].view(1, heads, 1, size), expected)
        assert not arrived.any()


@pytest.mark.parametrize("name", ["multi-head", "window"])
def test_prompts_in_pieces_and_single_tokens_are_what_the_network_makes_of_them(name: str) -> None:
    """In buffers that are larger than the pass and hold what the one before has left."""
    from qwen2kit_torch.engine.joined import join
    from qwen2kit_torch.engine.prompts import PassSize, PromptPass, Workspace
    from qwen2kit_torch.engine.storage import Storage

    spec = KINDS[name]
    model = ours(spec)
    cpu = torch.device("cpu")
    storage = Storage(spec, count=4, capacity=128, device=cpu, dtype=torch.float32)
    rope = model.module.rope(128, cpu, torch.float32)
    weights = join(model.module)
    long, short = TOKENS * 5, TOKENS[::-1]
    other = TOKENS[3:] * 3
    size = PassSize(rows=80, pieces=2, singles=5, wanted=70)
    with torch.inference_mode():
        workspace = Workspace.of(spec, weights, storage, size)
        step = PromptPass(spec, weights, storage, rope, size, workspace=workspace)
        exact = PromptPass(spec, weights, storage, rope, PassSize(60, 3, 0, 1))

    def run(some: Any, feeds: list[Feed], **order: Any) -> Any:
        with torch.inference_mode():
            some.set(feeds, **order)
            some.run()
            return some.logits[: sum(feed.wanted for feed in feeds)].clone()

    def close(found: Any, expected: Any) -> None:
        torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=0)

    feeds = [Feed(3, 0, tuple(long[:41])), Feed(1, 0, tuple(short[:3]), 0)]
    found = run(exact, [*feeds, Feed(0, 0, tuple(other[:16]), 0)])
    close(found, model.logits(long)[40:41])
    # Three tokens of one slot and one of another between two pieces, told in the order of feeds.
    feeds = [
        Feed(1, 3, tuple(short[3:17]), 2),
        Feed(0, 16, tuple(other[16:19]), 3),
        Feed(3, 41, tuple(long[41:]), 59),
        Feed(2, 0, (7,)),
    ]
    found = run(step, feeds, order=[1, 3, 0, 2], singles=2)
    close(found[:2], model.logits(short)[15:17])
    close(found[2:5], model.logits(other[:19])[16:])
    close(found[5:64], model.logits(long)[41:])
    close(found[64:], model.logits([7]))
    # Less than before in the same buffers.
    found = run(step, [Feed(0, 19, tuple(other[19:40])), Feed(2, 1, (9,))], order=[1, 0], singles=1)
    close(found, np.stack([model.logits(other[:40])[-1], model.logits([7, 9])[-1]]))


def test_captured_passes_take_what_fits_and_give_what_was_asked_for_in_its_order() -> None:
    """Without a GPU: what is captured is called again in place of a graph."""
    from types import SimpleNamespace

    from qwen2kit_torch.engine.captured_passes import CapturedPasses
    from qwen2kit_torch.engine.joined import join
    from qwen2kit_torch.engine.storage import Storage

    spec = KINDS["untied"]
    model = ours(spec)
    cpu = torch.device("cpu")
    captured: list[Any] = []

    def captures(work: Any) -> Any:
        captured.append(work)
        return SimpleNamespace(replay=work)

    storage = Storage(spec, count=3, capacity=64, device=cpu, dtype=torch.float32)
    rope = model.module.rope(64, cpu, torch.float32)
    passes = CapturedPasses(spec, join(model.module), storage, rope, captures)  # type: ignore[arg-type]
    first, second = tuple(TOKENS), tuple(TOKENS[::-1])
    with torch.inference_mode():
        found = passes.run([Feed(2, 0, first[:12]), Feed(0, 0, (7,))], [0], [1])
        assert found is not None
        assert not captured
        expected = np.stack([model.logits(list(first[:12]))[-1], model.logits([7])[0]])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        feeds = [Feed(0, 1, (8,)), Feed(1, 0, second, 2), Feed(2, 12, first[12:14], 0)]
        found = passes.run(feeds, [1], [0, 2])
        assert found is not None
        assert len(captured) == 1
        expected = np.concatenate([model.logits([7, 8])[1:], model.logits(list(second))[-2:]])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert passes.run([Feed(1, 0, (5,) * 40, 17)], [0], []) is None  # too many wanted
        assert passes.run([Feed(1, 0, (5,) * 2305)], [0], []) is None
    assert len(captured) == 1
