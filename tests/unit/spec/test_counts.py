"""Parameter counts against the published checkpoints (report table 1, model cards)."""

from __future__ import annotations

import pytest

from qwen2kit.errors import ConfigError
from qwen2kit.spec.counts import count_params, kv_bytes_per_token, train_flops_per_token
from qwen2kit.spec.presets import PRESETS, REPORT_PRESETS, preset

# name: (total, non-embedding) elements of the released safetensors files.
PUBLISHED = {
    "qwen2-0.5b": (494_032_768, 357_898_112),
    "qwen2-1.5b": (1_543_714_304, 1_310_340_608),
    "qwen2-7b": (7_615_616_512, 6_525_621_760),
    "qwen2-57b-a14b": (57_408_658_944, 56_319_581_696),
    "qwen2-72b": (72_706_203_648, 70_214_787_072),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 13_693_454_336),
    "qwen2.5-0.5b": (494_032_768, 357_898_112),
    "qwen2.5-1.5b": (1_543_714_304, 1_310_340_608),
    "qwen2.5-3b": (3_085_938_688, 2_774_773_760),
    "qwen2.5-7b": (7_615_616_512, 6_525_621_760),
    "qwen2.5-14b": (14_770_033_664, 13_212_898_304),
    "qwen2.5-32b": (32_763_876_352, 31_206_740_992),
    "qwen2.5-72b": (72_706_203_648, 70_214_787_072),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_and_non_embedding_equal_the_published_checkpoint(name: str) -> None:
    counts = count_params(preset(name))
    assert (counts.total, counts.non_embedding) == PUBLISHED[name]


def test_every_published_preset_is_checked() -> None:
    assert set(PRESETS) - {"tiny"} == set(PUBLISHED)
    assert set(REPORT_PRESETS) <= set(PRESETS)


@pytest.mark.parametrize(
    ("name", "activated", "activated_non_embedding"),
    [
        ("qwen2-57b-a14b", 14_249_270_784, 13_160_193_536),
        ("qwen1.5-moe-a2.7b", 2_689_173_504, 2_066_843_648),
    ],
)
def test_activated_parameters_of_mixtures(
    name: str, activated: int, activated_non_embedding: int
) -> None:
    counts = count_params(preset(name))
    assert counts.activated == activated
    assert counts.activated_non_embedding == activated_non_embedding


def test_a_dense_model_activates_everything() -> None:
    counts = count_params(preset("qwen2-0.5b"))
    assert counts.activated == counts.total
    assert counts.activated_non_embedding == counts.non_embedding


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2-0.5b", 12_288),
        ("qwen2-1.5b", 28_672),
        ("qwen2-7b", 57_344),
        ("qwen2-57b-a14b", 57_344),
        ("qwen2-72b", 327_680),
    ],
)
def test_kv_cache_bytes_per_token(name: str, expected: int) -> None:
    assert kv_bytes_per_token(preset(name)) == expected


def test_flops_are_six_per_matmul_weight_plus_causal_attention() -> None:
    spec = preset("qwen2-0.5b")
    short, long = (train_flops_per_token(spec, length) for length in (0, 2048))
    matrices = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864) + 151_936 * 896
    biases_and_norms = 24 * (896 + 2 * 128 + 2 * 896) + 896
    assert short == 6 * (matrices + biases_and_norms)
    assert long - short == 6 * 24 * 896 * 2048
    frozen = train_flops_per_token(spec, 2048, frozen=True)
    assert long - frozen == 2 * (matrices + biases_and_norms)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'qwen9'.*qwen2-0\.5b"):
        preset("qwen9")
