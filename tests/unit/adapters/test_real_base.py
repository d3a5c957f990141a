"""Adapters on the genuine 0.5B checkpoint, straight from its GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.adapters.merge import with_adapter
from qwen2kit.backend.plan import ExecutionPlan, LoRAPlan, TrainPlan
from qwen2kit.backend.protocol import TokenBatch
from qwen2kit.backend.registry import get, installed
from qwen2kit.weights.checkpoint import open_checkpoint
from tests.tiny_adapter import TARGETS, random_adapter

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


@pytest.mark.skipif(len(installed()) < 2, reason="needs two backends")
def test_merged_on_torch_and_beside_on_mlx_agree(real_gguf: Path) -> None:
    base = open_checkpoint(real_gguf)
    adapter = random_adapter(base.spec, rank=8, size=0.01, targets=("q_proj", "v_proj"))
    adapted = with_adapter(base, adapter)
    tokens = base.tokenizer().encode("def fibonacci(n):\n    return")
    logits = {}
    for backend in ("torch", "mlx"):
        plan = ExecutionPlan(device="cpu", dtype="float32")
        model = get(backend).compile(base.spec, plan)
        model.load(adapted.weights)
        logits[backend] = model.logits(tokens)
        del model
    assert np.abs(logits["torch"] - logits["mlx"]).max() < 1e-3
    assert np.array_equal(logits["torch"].argmax(-1), logits["mlx"].argmax(-1))


def test_qlora_learns_one_sentence(real_gguf: Path) -> None:
    """NF4 costs little loss, takes 4.5 bits a weight, and its adapters learn."""
    torch = pytest.importorskip("torch")
    base = open_checkpoint(real_gguf)
    text = "The capital of the Republic of Examplia is Sampletown, founded in 1847 by bakers."
    batch = _batch(base.tokenizer().encode(text))
    losses = {}
    for quantize in ("none", "nf4"):
        adapter = LoRAPlan(rank=8, alpha=16.0, targets=TARGETS, quantize=quantize)  # type: ignore[arg-type]
        plan = ExecutionPlan(device="cpu", dtype="float32", train=TrainPlan(adapter=adapter))
        model: Any = get("torch").compile(base.spec, plan)
        model.load(base.weights)
        losses[quantize] = [model.loss(batch).loss]
        if quantize == "nf4":
            packed = [p for p in model.module.parameters() if p.dtype == torch.uint8]
            assert len(packed) == 7 * base.spec.num_hidden_layers
            for _ in range(3):
                model.train_step(batch, 1e-3)
            losses[quantize].append(model.loss(batch).loss)
        del model
    assert abs(losses["nf4"][0] - losses["none"][0]) < 0.3
    assert losses["nf4"][1] < losses["nf4"][0] - 1.0


def _batch(ids: list[int]) -> TokenBatch:
    tokens = np.array([ids[:-1]], dtype=np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    return TokenBatch(
        tokens, np.array([ids[1:]], dtype=np.int32), positions, np.zeros_like(positions)
    )
