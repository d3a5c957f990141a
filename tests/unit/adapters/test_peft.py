"""Adapters that PEFT wrote read here, ours load there, and both compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.adapters.directory import open_adapter, write_adapter
from qwen2kit.adapters.merge import AdaptedSource
from qwen2kit.spec.model import ModelSpec
from tests.conftest import random_weights, small_spec
from tests.tiny_adapter import TARGETS, random_adapter
from tests.unit.torch.peers import TOKENS, ours, theirs

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SETTINGS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": list(TARGETS)},
    "rank stabilised": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 2},
        "alpha_pattern": {"down_proj": 5},
    },
    "regular expression": {"target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj"},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "excluded": {"target_modules": ["k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "all-linear": {"target_modules": "all-linear"},
}


def adapted(spec: ModelSpec, **settings: Any) -> Any:
    """PEFT's model around transformers' Qwen2, both factors random."""
    config = peft.LoraConfig(
        **({"r": 4, "lora_alpha": 8.0, "task_type": "CAUSAL_LM", "lora_dropout": 0.1} | settings)
    )
    model = peft.get_peft_model(theirs(spec), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
    return model


def logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_made_by_peft_computes_the_same_here(
    setting: str, tied: bool, tmp_path: Path
) -> None:
    spec = small_spec(tied=tied)
    model = adapted(spec, **SETTINGS[setting])
    model.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path)
    adapter.check_fits(spec)
    changed = ours(spec, AdaptedSource(random_weights(spec), adapter)).logits(TOKENS)
    expected = logits(model)
    assert np.abs(changed - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(changed - ours(spec).logits(TOKENS)).max() > 1e-2


@pytest.mark.parametrize("rank", [4, 64], ids=["r=4", "r=d"])
@pytest.mark.parametrize("targets", [TARGETS, ("k_proj", "gate_proj")], ids=["all", "two"])
def test_an_adapter_of_ours_computes_the_same_in_peft(
    rank: int, targets: tuple[str, ...], tmp_path: Path
) -> None:
    spec = small_spec()
    adapter = random_adapter(spec, rank=rank, scale=1.5, targets=targets)
    write_adapter(adapter, tmp_path / "out", to="hf", force=False)
    model = peft.PeftModel.from_pretrained(theirs(spec), tmp_path / "out").eval()
    expected = ours(spec, AdaptedSource(random_weights(spec), adapter)).logits(TOKENS)
    assert np.abs(logits(model) - expected).max() < 1e-5 * np.abs(expected).max()
    stored = peft.get_peft_model_state_dict(model)
    assert len(stored) == 2 * len(adapter.modules)


def test_merging_gives_the_weights_that_peft_merges(tmp_path: Path) -> None:
    spec = small_spec()
    model = adapted(spec, target_modules=list(TARGETS), use_rslora=True)
    model.save_pretrained(tmp_path)
    source = AdaptedSource(random_weights(spec), open_adapter(tmp_path))
    merged = model.merge_and_unload().state_dict()
    assert set(source.names()) <= set(merged)
    for name in source.names():
        expected = merged[name].numpy()
        assert source.info(name).shape == expected.shape
        np.testing.assert_allclose(source.read(name).float32(), expected, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_rewriting_an_adapter_changes_nothing(setting: str, tmp_path: Path) -> None:
    """PEFT -> here -> PEFT: the config may say it differently, the function stays."""
    spec = small_spec()
    model = adapted(spec, **SETTINGS[setting])
    model.save_pretrained(tmp_path / "in")
    write_adapter(open_adapter(tmp_path / "in"), tmp_path / "out", to="hf", force=False)
    again = peft.PeftModel.from_pretrained(theirs(spec), tmp_path / "out").eval()
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-5)
    first, second = open_adapter(tmp_path / "in"), open_adapter(tmp_path / "out")
    assert first.modules.keys() == second.modules.keys()
    for path, update in first.modules.items():
        assert update.scale == pytest.approx(second.modules[path].scale, rel=1e-9)


def test_the_dtype_can_be_changed(tmp_path: Path) -> None:
    adapter = random_adapter(small_spec())
    write_adapter(adapter, tmp_path / "out", to="hf", dtype="bfloat16", force=False)
    read = open_adapter(tmp_path / "out")
    assert read.dtype == "bfloat16"
    update = next(iter(adapter.modules))
    expected = torch.tensor(adapter.modules[update].a.float32()).bfloat16().float().numpy()
    assert np.array_equal(read.modules[update].a.float32(), expected)


def test_the_config_keeps_the_hyper_parameters(tmp_path: Path) -> None:
    model = adapted(small_spec(), r=3, lora_alpha=8, target_modules=["q_proj"], use_rslora=True)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path / "in")
    write_adapter(open_adapter(tmp_path / "in"), tmp_path / "out", to="hf", force=False)
    kept = ("r", "lora_alpha", "use_rslora", "lora_dropout", "base_model_name_or_path")
    first, second = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("in", "out")
    )
    assert {key: first[key] for key in kept} == {key: second[key] for key in kept}
