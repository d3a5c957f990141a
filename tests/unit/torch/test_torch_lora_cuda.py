"""Adapters and NF4 on a CUDA device, where layers are compiled and products are bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.plan import LoRAPlan
from tests.conftest import random_weights, small_spec
from tests.parallel.curves import Case, batch_of, model_of, spec_of
from tests.tiny_adapter import TARGETS

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PLAN = LoRAPlan(rank=4, alpha=8.0, targets=TARGETS, seed=1)
PLANS = {"lora": PLAN, "qlora": replace(PLAN, quantize="nf4")}


def started(plan: LoRAPlan, device: str, dtype: str) -> Any:
    case = Case(plan={"adapter": plan}, packed=True)
    model = model_of(case, device, dtype)
    model.load(random_weights(spec_of(case)))
    return model


def losses(model: Any, steps: range) -> list[float]:
    case = Case(packed=True)
    return [model.train_step(batch_of(case, step), 2e-3).loss for step in steps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_the_same_on_both_devices(dtype: Any) -> None:
    from qwen2kit_torch.lora_nf4 import dequantize, quantize

    weight = torch.randn(256, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = quantize(weight), quantize(weight.cuda())
    assert torch.equal(here[0], there[0].cpu())
    assert torch.equal(here[1], there[1].cpu())
    dense = dequantize(*there, (256, 320), dtype)
    assert torch.equal(dequantize(*here, (256, 320), dtype), dense.cpu())


@pytest.mark.parametrize("name", PLANS)
def test_compiled_bfloat16_training_follows_the_cpu(name: str) -> None:
    expected = losses(started(PLANS[name], "cpu", "float32"), range(8))
    found = losses(started(PLANS[name], "cuda", "bfloat16"), range(8))
    np.testing.assert_allclose(found, expected, rtol=2e-2)


@pytest.mark.parametrize("name", PLANS)
def test_resume_with_dropout_draws_the_same_masks(name: str, tmp_path: Path) -> None:
    plan = replace(PLANS[name], dropout=0.3)
    first = started(plan, "cuda", "bfloat16")
    losses(first, range(3))
    first.save_state(tmp_path).wait()
    rest = losses(first, range(3, 6))
    torch.cuda.manual_seed_all(999)
    second = started(plan, "cuda", "bfloat16")
    second.restore_state(tmp_path)
    np.testing.assert_allclose(losses(second, range(3, 6)), rest, rtol=1e-6)


def test_the_device_holds_four_and_a_half_bits_a_weight() -> None:
    from qwen2kit_torch.lora import add_lora
    from qwen2kit_torch.lora_weights import (
        initial_factors,
        load_base,
        load_factors,
    )
    from qwen2kit_torch.model import Qwen2

    spec = small_spec(vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
                      num_attention_heads=8, num_key_value_heads=8, head_dim=128)  # fmt: skip
    source = random_weights(spec)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    network = Qwen2(spec, device="meta")
    add_lora(network, PLANS["qlora"], dtype=torch.bfloat16)
    load_base(network, source, torch.device("cuda"))
    load_factors(network, initial_factors(network, 0))
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    matrices = 4 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    factors = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert held < matrices * 4.5 / 8 + factors * 4 + 2e6
