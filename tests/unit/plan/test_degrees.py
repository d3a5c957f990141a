"""Which mesh degrees a model allows, and what is said of the others."""

from __future__ import annotations

import pytest

from qwen2kit.errors import ConfigError
from qwen2kit.plan.degrees import Degrees, check_degrees
from qwen2kit.spec.presets import preset


def test_what_is_left_of_the_processes_is_sharded() -> None:
    assert Degrees(dp_shard=0, tp=2, cp=2).fill(16).dp_shard == 4
    assert Degrees(dp_shard=0).fill(1) == Degrees()


@pytest.mark.parametrize(
    ("degrees", "world", "message"),
    [
        (Degrees(dp_shard=0, tp=3), 8, "8 processes cannot be divided by tp=3"),
        (Degrees(dp_shard=2, tp=2), 8, "dp_shard=2 x tp=2 needs 4 processes, but 8 are running"),
        (Degrees(pp=2), 1, "pp=2 needs 2 processes, but 1 are running"),
    ],
)
def test_degrees_must_fill_the_world(degrees: Degrees, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        degrees.fill(world)


@pytest.mark.parametrize(
    ("model", "degrees", "messages"),
    [
        (
            "qwen2-0.5b",
            Degrees(tp=4),
            [
                r"tp=4 does not divide num_attention_heads=14 \(the largest smaller tp .* is 2\)",
                r"num_key_value_heads=2 \(the largest smaller tp .* is 2\)",
            ],
        ),
        ("qwen2-72b", Degrees(tp=16), [r"num_key_value_heads=8 \(.* is 8\)"]),
        ("qwen2-72b", Degrees(tp=5), ["intermediate_size=29568", "vocab_size=152064"]),
        ("qwen2-7b", Degrees(tp=8), ["num_attention_heads=28", "num_key_value_heads=4"]),
        ("qwen2-0.5b", Degrees(pp=25), ["pp=25 needs a layer for every stage, but there are 24"]),
    ],
)
def test_a_model_refuses_what_it_cannot_be_divided_by(
    model: str, degrees: Degrees, messages: list[str]
) -> None:
    for message in messages:
        with pytest.raises(ConfigError, match=message):
            check_degrees(preset(model), degrees)


@pytest.mark.parametrize(
    ("degrees", "recipe", "message"),
    [
        (Degrees(cp=4), {"seq_len": 4100}, "cp=4 cuts a row into 8 equal pieces"),
        (Degrees(tp=4), {"seq_len": 4098}, "does not divide the 4098 tokens"),
        (Degrees(dp_shard=3), {"batch_rows": 8}, "batch_rows=8 is not a multiple of"),
        (
            Degrees(dp_shard=2),
            {"batch_rows": 8, "micro_batch_rows": 3},
            "micro_batch_rows=3 does not divide the 4 rows",
        ),
        (
            Degrees(pp=4),
            {"batch_rows": 8, "micro_batch_rows": 4},
            "pp=4 needs as many micro-batches per step",
        ),
    ],
)
def test_a_recipe_must_fit_its_degrees(
    degrees: Degrees, recipe: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_degrees(preset("qwen2-7b"), degrees, **recipe)


@pytest.mark.parametrize("model", ["qwen2-0.5b", "qwen2-7b", "qwen2-72b", "qwen2.5-32b"])
def test_every_product_of_powers_of_two_that_divides_is_accepted(model: str) -> None:
    spec = preset(model)
    powers = (1, 2, 4, 8)
    accepted = 0
    for tp in (power for power in powers if spec.num_key_value_heads % power == 0):
        for pp in (1, 2, 4):
            for cp in powers:
                for shard in powers:
                    degrees = Degrees(tp=tp, pp=pp, cp=cp, dp_shard=shard, dp_replicate=2)
                    check_degrees(spec, degrees, seq_len=32768, batch_rows=128, micro_batch_rows=1)
                    accepted += degrees.world == 2 * tp * pp * cp * shard
    assert accepted >= 96
