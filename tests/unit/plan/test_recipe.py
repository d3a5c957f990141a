"""From recipes and presets to workloads, without network."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2kit.config.load import shipped
from qwen2kit.config.tree import ParallelConfig
from qwen2kit.errors import ConfigError
from qwen2kit.plan.degrees import Degrees
from qwen2kit.plan.recipe import phases_of, read, spec_of
from qwen2kit.spec.presets import preset
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_can_be_planned(name: str) -> None:
    config = read(name, [])
    phase, *later = phases_of(config, spec_of(config.model))
    assert (phase.degrees is None) == (config.parallel == ParallelConfig())
    assert bool(later) == (config.long is not None)
    steps = [p.steps for p in (phase, *later) if p.steps is not None]
    assert sum(steps) == (config.train.steps or 0)
    step = phase.workload
    assert (step.seq_len, step.batch_rows) == (config.seq_len, config.train.batch_rows)
    assert step.plan.micro_batch_rows == config.train.micro_batch_rows
    assert (step.plan.adapter is None) == (config.adapter is None)


def test_a_preset_is_a_recipe() -> None:
    config = read("Qwen2-72B", ["seq_len=8192"])
    assert spec_of(config.model) == preset("qwen2-72b")
    assert (config.seq_len, config.train.batch_rows) == (8192, 1024)
    assert read("qwen2-7b", ["train.batch_rows=64"]).train.batch_rows == 64


def test_a_file_or_recipe_goes_before_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read("tiny", []).task == "sft"  # the recipe, not the preset of that name
    monkeypatch.chdir(tmp_path)
    Path("qwen2-7b").write_text('extends = ["pretrain"]\nseq_len = 512\n')
    assert read("qwen2-7b", []).seq_len == 512


def test_a_local_checkpoint_needs_its_config_only(tmp_path: Path) -> None:
    spec = write_tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = read("sft", [f"model.checkpoint={tmp_path}"])
    assert spec_of(config.model) == spec


def test_published_checkpoints_are_presets() -> None:
    config = read("sft", ["model.checkpoint=Qwen/Qwen2.5-14B-Instruct"])
    assert spec_of(config.model) == preset("qwen2.5-14b")


def test_fields_of_the_recipe_change_the_spec() -> None:
    config = read("qwen2-0.5b", ["model.num_hidden_layers=12"])
    assert spec_of(config.model).num_hidden_layers == 12


@pytest.mark.parametrize("checkpoint", ["somebody/else", "Qwen/Qwen3-8B", "no-such-directory"])
def test_an_absent_checkpoint_is_refused_with_a_way_out(checkpoint: str) -> None:
    config = read("sft", [f"model.checkpoint={checkpoint}"])
    with pytest.raises(ConfigError, match=r"config\.json .*model\.preset="):
        spec_of(config.model)


def test_unknown_names_list_recipes_and_presets() -> None:
    with pytest.raises(ConfigError, match=r"pretrain.*qwen2-72b"):
        read("qwen9", [])


def test_degrees_are_explicit_or_open() -> None:
    config = read("qwen2-7b", ["parallel.tp=4"])
    (phase,) = phases_of(config, spec_of(config.model))
    assert phase.degrees == Degrees(tp=4, dp_shard=0)


def test_a_long_phase_is_planned_apart() -> None:
    changes = ["long.fraction=0.1", "long.seq_len=32768", "long.rope_theta=1e6"]
    config = read("pretrain", [*changes, "parallel.dp_replicate=2", "long.parallel.cp=8"])
    first, second = phases_of(config, spec_of(config.model))
    assert (first.name, first.steps, first.degrees) == (
        "training", 90_000, Degrees(dp_replicate=2, dp_shard=0),
    )  # fmt: skip
    assert (second.name, second.steps, second.degrees) == (
        "long", 10_000, Degrees(cp=8, dp_shard=0),
    )  # fmt: skip
    assert second.workload.seq_len == 32_768
    assert second.workload.tokens_per_step == first.workload.tokens_per_step
    config = read("pretrain", [*changes, "parallel.dp_replicate=2"])
    _, second = phases_of(config, spec_of(config.model))
    assert second.degrees == Degrees(dp_replicate=2, dp_shard=0)
