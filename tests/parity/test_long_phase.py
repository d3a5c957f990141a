"""The concluding long phase of a run against transformers and torch.optim, whose RoPE we swap."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen2kit.backend.plan import AdamWPlan
from qwen2kit.config.load import load_recipe
from qwen2kit.config.tree import RunConfig
from qwen2kit.errors import ConfigError
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.train import run
from qwen2kit.train.phases import following, phases
from qwen2kit.train.run_dir import read_origin
from qwen2kit.train.schedule import learning_rate
from qwen2kit.train.setup import build_data
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.source import MemorySource
from tests.parallel.runs import TINY, losses, records
from tests.parity.test_train_parity import HfTrainer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STEPS, SWITCH = 20, 12
LONG = (
    "task=pretrain", "packing=false", f"train.steps={STEPS}", "seq_len=12", "cpu_threads=1",
    "model.rope_theta=1e4", "model.max_position_embeddings=12", "checkpoint.initial=true",
    "train.batch_rows=8", "train.micro_batch_rows=2", "checkpoint.every=5", "checkpoint.keep=9",
    "train.optimizer.weight_decay=0.1",
    "long.fraction=0.4", "long.seq_len=48", "long.rope_theta=1e6",
)  # fmt: skip


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_recipe("tiny", [*TINY, *LONG])


@pytest.fixture(scope="module")
def run_dir(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "run"
    result = run.start(config, run_dir=path)
    assert (result.status, result.step) == ("finished", STEPS)
    return path


def test_losses_are_those_of_transformers_with_its_rope_swapped(
    config: RunConfig, run_dir: Path
) -> None:
    origin = read_origin(run_dir)
    both = phases(config, origin.spec, 1)
    assert [phase.config.seq_len for phase in both] == [12, 48]
    assert [phase.config.train.batch_rows for phase in both] == [8, 2]  # as many tokens per step
    start = open_checkpoint(run_dir / "initial").weights
    weights = MemorySource({name: start.read(name) for name in start.names()})
    settings = config.train.optimizer
    plan = AdamWPlan(weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm)
    theirs = HfTrainer(both[0].spec, weights, plan)
    loaders = [build_data(phase.config, origin.tokenizer, print).train for phase in both]
    ours = losses(run_dir)
    for step in range(STEPS):
        phase = following(both, step)
        if step == SWITCH:
            changed = transformers.Qwen2Config(**to_hf_config(phase.spec, dtype="float32"))
            rotary = theirs.model.model.rotary_emb
            theirs.model.model.rotary_emb = type(rotary)(changed)
        lr = learning_rate(config.train.schedule, config.train.lr, step, STEPS)
        expected, _ = theirs.step(loaders[phase.number].next_batch(), lr)
        assert ours[step + 1] == pytest.approx(expected, abs=1e-4), step + 1
    # Had RoPE not been swapped, the last losses would be others.
    still = HfTrainer(both[0].spec, weights, plan)
    assert torch.equal(still.model.model.rotary_emb.inv_freq, rotary.inv_freq)
    assert not torch.allclose(rotary.inv_freq, theirs.model.model.rotary_emb.inv_freq)


def test_schedule_and_counts_go_on_and_the_model_says_its_new_context(
    config: RunConfig, run_dir: Path
) -> None:
    steps = [record for record in records(run_dir) if record["event"] == "step"]
    expected = [
        learning_rate(config.train.schedule, config.train.lr, step, STEPS) for step in range(STEPS)
    ]
    assert [record["lr"] for record in steps] == expected
    tokens = [record["tokens"] for record in steps]
    assert tokens == sorted(tokens)
    held_out = [record["seq_len"] for record in records(run_dir) if record["event"] == "eval"]
    assert held_out == [12, 48]
    exported = json.loads((run_dir / "model" / "config.json").read_text())
    theirs = transformers.AutoConfig.from_pretrained(run_dir / "model")
    assert exported["max_position_embeddings"] == theirs.max_position_embeddings == 48
    assert theirs.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize("step", [10, SWITCH, 15])
def test_resume_before_at_and_after_the_switch(
    step: int, config: RunConfig, run_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    document = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(document | {"status": "running"}))
    run.resume(copy)
    assert losses(copy) == losses(run_dir)


def test_refusals(tmp_path: Path) -> None:
    cases = {
        "long.fraction leaves no step": ("train.steps=2", "long.fraction=0.9"),
        "share of train.steps": ("train.epochs=1",),
        "long: seq_len=48 exceeds the model's max_position_embeddings=20": (
            "long.max_position_embeddings=20",
        ),
        "long: micro_batch_rows=2 must divide batch_rows=3": (
            "long.batch_rows=3", "long.micro_batch_rows=2",
        ),
        "long.fraction: missing": ("long={seq_len=64, rope_theta=1e6}",),
    }  # fmt: skip
    for message, changes in cases.items():
        with pytest.raises(ConfigError) as caught:
            run.start(load_recipe("tiny", [*TINY, *LONG, *changes]), run_dir=tmp_path / "x")
        assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []
