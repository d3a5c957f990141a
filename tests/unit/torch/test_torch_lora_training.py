"""Adapters in the training backend: against PEFT, resumed, and on several processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen2kit.adapters.lora import Adapter, LowRank, adaptable, factor_names, lora_scale
from qwen2kit.adapters.merge import AdaptedSource
from qwen2kit.backend.plan import AdamWPlan, LoRAPlan
from qwen2kit.backend.protocol import AdapterModel, TokenBatch
from qwen2kit.errors import BackendError
from qwen2kit.plan.degrees import Degrees
from tests.conftest import random_weights
from tests.parallel.curves import Case, batch_of, model_of, share, spec_of
from tests.parallel.workers import run_on
from tests.tiny_adapter import TARGETS
from tests.unit.torch.peers import theirs

torch = pytest.importorskip("torch")

PLAN = LoRAPlan(rank=4, alpha=8.0, targets=TARGETS, seed=1)
NF4 = replace(PLAN, quantize="nf4", targets=TARGETS[:4])


def case_of(plan: LoRAPlan, **changes: Any) -> Case:
    return Case(plan={"adapter": plan, **changes.pop("train", {})}, **changes)


def started(case: Case, dtype: str = "float32") -> Any:
    model = model_of(case, dtype=dtype)
    model.load(random_weights(spec_of(case)))
    return model


def factors(model: AdapterModel) -> dict[str, np.ndarray]:
    return {name: tensor.float32().copy() for name, tensor in model.export_adapter()}


class PeftTrainer:
    """PEFT's LoRA on transformers' Qwen2 with torch.optim.AdamW, as anyone would use them."""

    def __init__(self, case: Case, plan: LoRAPlan, start: dict[str, np.ndarray]) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            r=plan.rank, lora_alpha=plan.alpha, target_modules=list(plan.targets),
            use_rslora=plan.rslora, task_type="CAUSAL_LM",
        )  # fmt: skip
        self.model = peft.get_peft_model(theirs(spec_of(case)), config)
        state = {f"base_model.model.{n}": torch.from_numpy(v) for n, v in start.items()}
        peft.set_peft_model_state_dict(self.model, state)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        settings = AdamWPlan()
        self.max_norm = settings.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.trained, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )

    def step(self, batch: TokenBatch, lr: float) -> tuple[float, float]:
        logits = self.model(input_ids=torch.from_numpy(batch.tokens).long()).logits
        labels = torch.from_numpy(batch.labels).long().flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float(loss.detach()), float(norm)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rslora", [False, True])
def test_twenty_steps_are_those_of_peft_and_torch_adamw(rslora: bool, tied: bool) -> None:
    plan = replace(PLAN, rslora=rslora)
    case = case_of(plan, tied=tied)
    model = started(case)
    peer = PeftTrainer(case, plan, factors(model))
    losses = []
    for step in range(20):
        batch, lr = batch_of(case, step % 4), 2e-3 * (1 + step % 3)
        metrics = model.train_step(batch, lr)
        loss, norm = peer.step(batch, lr)
        assert metrics.loss == pytest.approx(loss, abs=1e-5)
        assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
        losses.append(metrics.loss)
    assert losses[-1] < losses[0] - 0.3


RESUMED = {
    "lora": (PLAN, "float32"),
    "lora, bfloat16": (PLAN, "bfloat16"),
    "dropout": (replace(PLAN, dropout=0.3), "float32"),
    "qlora, dropout": (replace(NF4, dropout=0.3), "bfloat16"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bit_identical(name: str, tmp_path: Path) -> None:
    plan, dtype = RESUMED[name]
    case = case_of(plan, packed=True)
    first = started(case, dtype)
    (tmp_path / "state").mkdir()
    losses = []
    for step in range(6):
        if step == 3:
            first.save_state(tmp_path / "state").wait()
        losses.append(first.train_step(batch_of(case, step), 5e-3).loss)
    torch.manual_seed(12345)
    second = started(case, dtype)
    second.restore_state(tmp_path / "state")
    again = [second.train_step(batch_of(case, step), 5e-3).loss for step in range(3, 6)]
    assert again == losses[3:]
    mine, resumed = factors(first), factors(second)
    assert mine.keys() == resumed.keys()
    assert all(np.array_equal(mine[n], resumed[n]) for n in mine)
    untrained = factors(started(case, dtype))
    assert not any(np.array_equal(mine[n], untrained[n]) for n in mine)


def test_a_checkpoint_holds_the_adapter_and_its_moments_only(tmp_path: Path) -> None:
    case = case_of(NF4)
    model = started(case)
    model.train_step(batch_of(case, 0), 1e-3)
    model.save_state(tmp_path).wait()
    stored = {
        name: tensor
        for file in tmp_path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    elements = sum(value.size for value in factors(model).values())
    assert sum(tensor.size for tensor in stored.values()) <= 3 * elements + len(stored)
    assert all("lora_" in name or tensor.size == 1 for name, tensor in stored.items())


def test_dropout_is_off_when_nothing_is_trained() -> None:
    case = case_of(replace(PLAN, dropout=0.5))
    model = started(case)
    model.train_step(batch_of(case, 0), 1e-2)
    held_out = {model.loss(batch_of(case, 9)).loss for _ in range(3)}
    assert len(held_out) == 1
    tokens = batch_of(case, 9).tokens[0].tolist()
    assert np.array_equal(model.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize("plan", [PLAN, NF4], ids=["lora", "qlora"])
def test_the_export_is_the_base_with_the_adapter_merged(plan: LoRAPlan) -> None:
    case = case_of(plan)
    model = started(case)
    for step in range(3):
        model.train_step(batch_of(case, step), 1e-2)
    found = factors(model)
    assert isinstance(model, AdapterModel)
    tensors = dict(model.export_adapter())
    scale = lora_scale(plan.rank, plan.alpha, rslora=plan.rslora)
    modules = {
        path: LowRank(*(tensors[name] for name in factor_names(path)), scale)
        for path, _ in adaptable(spec_of(case))
        if factor_names(path)[0] in found
    }
    assert len(modules) == len(found) // 2 == 4 * len(plan.targets)
    base = started(case) if plan.quantize == "nf4" else None
    source = random_weights(spec_of(case))
    if base is not None:  # B is zero at the start: this is the quantised base
        from qwen2kit.weights.source import MemorySource

        source = MemorySource(dict(base.export()))
    merged = AdaptedSource(source, Adapter(path=Path("memory"), format="hf", modules=modules))
    for name, tensor in model.export():
        np.testing.assert_allclose(tensor.float32(), merged.read(name).float32(), atol=1e-6)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="an adapter needs the weights of a checkpoint"):
        model_of(case_of(PLAN)).init(0)
    started(case_of(PLAN)).save_state(tmp_path).wait()
    with pytest.raises(BackendError, match="no weights yet"):
        model_of(case_of(PLAN)).restore_state(tmp_path)
    with pytest.raises(BackendError, match="adapters and float8 do not go together"):
        model_of(case_of(PLAN, train={"float8": True}))


def trained(case: Case) -> Any:
    """Losses of four steps, then the adapter and one merged matrix."""
    model = started(case)
    losses = [
        model.train_step(share(batch_of(case, step), *model.data_shard), 2e-3).loss
        for step in range(4)
    ]
    return losses, factors(model), {n: t.float32().copy() for n, t in model.export()}


@pytest.mark.parametrize("plan", [PLAN, NF4], ids=["lora", "qlora"])
@pytest.mark.parametrize(
    "degrees",
    [Degrees(dp_shard=2), Degrees(dp_replicate=2), Degrees(cp=2)],
    ids=lambda degrees: degrees.describe(),
)
def test_two_processes_do_what_one_does(degrees: Degrees, plan: LoRAPlan, tmp_path: Path) -> None:
    case = case_of(plan, packed=True)
    losses, adapter, merged = trained(case)
    for found in run_on(2, trained, tmp_path, replace(case, degrees=degrees)):
        np.testing.assert_allclose(found[0], losses, rtol=1e-5)
        for mine, expected in ((found[1], adapter), (found[2], merged)):
            assert mine.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_allclose(mine[name], value, rtol=1e-3, atol=2e-5, err_msg=name)


def refusal(case: Case) -> str:
    with pytest.raises(BackendError) as error:
        model_of(case)
    return str(error.value)


def test_tensor_parallel_adapters_are_refused(tmp_path: Path) -> None:
    case = case_of(PLAN, degrees=Degrees(tp=2))
    for message in run_on(2, refusal, tmp_path, case):
        assert "set parallel.tp=1" in message
