"""LoRA as a user runs it: train, resume, chat, evaluate, merge, convert; and every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.adapters.directory import open_adapter, write_adapter
from qwen2kit.backend.registry import installed
from tests.eval_tasks import write_tasks
from tests.run_cli import run_cli, run_json
from tests.tiny_adapter import random_adapter
from tests.tiny_checkpoint import write_tiny_checkpoint

SHORT = ("--prompt", "what is 7?", "--max-new-tokens", "8", "--greedy", "--dtype", "float32")
ANSWER = "the cat sat on the mat"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and conversations that all have one answer."""
    home = tmp_path_factory.mktemp("lora")
    write_tiny_checkpoint(home / "base")
    turns = [
        [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": ANSWER}]
        for i in range(60)
    ]
    lines = [json.dumps({"messages": conversation}) for conversation in turns]
    (home / "chats.jsonl").write_text("\n".join(lines))
    return home


def train(home: Path, recipe: str, run: str, *changes: str, **options: Any) -> Any:
    return run_json(
        "train", recipe, f"model.checkpoint={home / 'base'}",
        f"data.paths=['{home / 'chats.jsonl'}']",
        "data.format={kind='messages',column='messages'}",
        "seq_len=96", "train.batch_rows=4", "train.micro_batch_rows=2", "train.lr=1e-2",
        "cpu_threads=1", "eval.fraction=0.1", "checkpoint.every=10", "checkpoint.keep=9",
        *changes, "--run-dir", home / run, cwd=home, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    if "torch" not in installed():
        pytest.skip("torch is not installed")
    result = train(home, "lora", "run", "train.steps=40", "adapter.dropout=0.1")
    assert (result["status"], result["step"]) == ("finished", 40)
    assert result["after"]["loss"] < 0.5 * result["before"]["loss"]
    return home / "run"


@pytest.fixture(scope="module")
def ready(home: Path) -> Path:
    """An adapter made without training, for what needs no torch."""
    if not installed():
        pytest.skip("no backend installed")
    spec = write_tiny_checkpoint(home / "base")
    write_adapter(random_adapter(spec), home / "ready", to="hf", force=True)
    return home / "ready"


def test_the_runs_model_is_an_adapter(run: Path, home: Path) -> None:
    assert {path.name for path in (run / "model").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    adapter = open_adapter(run / "model")
    assert adapter.base_model == str(home / "base")
    assert (adapter.rank, len(adapter.modules), adapter.dtype) == (16, 21, "float32")
    for checkpoint in (run / "checkpoints").iterdir():
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        assert size < 4 * sum(file.stat().st_size for file in (run / "model").iterdir())


def test_peft_loads_what_a_run_exports(run: Path, home: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from qwen2kit.backend.loading import load_model
    from qwen2kit.backend.plan import ExecutionPlan

    ours = load_model(run, backend="torch", plan=ExecutionPlan(device="cpu", dtype="float32"))
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "base")
    model = peft.PeftModel.from_pretrained(model, run / "model").eval()
    ids = ours.tokenizer.encode_chat([{"role": "user", "content": "what is 7?"}])
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(ours.model.logits(ids), expected, atol=1e-4)


def test_a_resumed_run_ends_with_the_same_adapter(run: Path, home: Path) -> None:
    half = home / "half"
    shutil.copytree(run, half)
    shutil.rmtree(half / "model")
    for step in (30, 40):
        shutil.rmtree(half / "checkpoints" / f"step-{step:08d}")
    document = json.loads((half / "run.json").read_text())
    (half / "run.json").write_text(json.dumps(document | {"status": "stopped"}))
    done = run_cli("train", "--resume", half)
    assert done.returncode == 0, done.stderr
    name = "model/adapter_model.safetensors"
    assert (half / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("backend", installed())
def test_chat_with_the_run_or_with_base_and_adapter(backend: str, run: Path, home: Path) -> None:
    options = (*SHORT, "--backend", backend)
    alone = run_json("chat", run, *options)
    both = run_json("chat", home / "base", "--adapter", run, *options)
    plain = run_json("chat", home / "base", *options)
    assert alone["text"] == both["text"] == ANSWER
    assert plain["text"] != ANSWER
    assert alone["adapter"] == both["adapter"] == str(run / "model")
    assert plain["adapter"] is None


def test_qlora_learns_too(home: Path) -> None:
    if "torch" not in installed():
        pytest.skip("torch is not installed")
    result = train(home, "qlora", "qlora", "train.steps=40", "device='cpu'", "adapter.rank=8")
    assert result["after"]["loss"] < 0.5 * result["before"]["loss"]
    assert open_adapter(home / "qlora" / "model").rank == 8
    assert run_json("chat", home / "qlora", *SHORT)["text"] == ANSWER


def test_merging_writes_a_model_that_passes_verification(ready: Path, home: Path) -> None:
    document = run_json("convert", home / "base", home / "merged", "--adapter", ready, "--verify")
    assert document["verify"]["passed"]
    assert document["verify"]["lossless"]
    assert document["adapter"] == str(ready)
    record = json.loads((home / "merged" / "qwen2kit.json").read_text())
    assert record["source"]["adapter"] == str(ready)
    merged = run_json("chat", home / "merged", *SHORT)
    beside = run_json("chat", home / "base", "--adapter", ready, *SHORT)
    assert merged["text"] == beside["text"]


def test_an_adapter_alone_changes_its_layout(ready: Path, home: Path) -> None:
    document = run_json("convert", ready, home / "for-mlx", "--to", "mlx")
    assert (document["source_format"], document["format"]) == ("hf", "mlx")
    assert (document["modules"], document["rank"]) == (21, 4)
    assert (home / "for-mlx" / "adapters.safetensors").is_file()
    back = run_cli("convert", home / "for-mlx", home / "back", "--dtype", "float32")
    assert back.returncode == 0, back.stderr
    assert "(mlx-lm) -> " in back.stderr
    name = "adapter_model.safetensors"
    assert (home / "back" / name).read_bytes() == (ready / name).read_bytes()
    texts = {
        run_json("chat", home / "base", "--adapter", home / where, *SHORT)["text"]
        for where in ("ready", "for-mlx", "back")
    }
    assert len(texts) == 1


@pytest.mark.slow
def test_evaluation_says_which_adapter_it_scored(ready: Path, home: Path) -> None:
    pytest.importorskip("lm_eval")
    write_tasks(home / "tasks")
    options = (
        "--tasks", "tiny_choice", "--include-path", home / "tasks", "--limit", "4",
        "--dtype", "float32",
    )  # fmt: skip
    env = {"HF_DATASETS_CACHE": str(home / "cache")}
    merged = home / "merged-for-eval"
    done = run_cli("convert", home / "base", merged, "--adapter", ready)
    assert done.returncode == 0, done.stderr
    documents = [
        run_json("eval", *model, *options, "--output", home / name, env=env)
        for name, model in (
            ("beside", (home / "base", "--adapter", ready)),
            ("whole", (merged,)),
        )
    ]
    provenance = [document["provenance"]["model"]["adapter"] for document in documents]
    assert provenance[1] is None
    assert provenance[0]["path"] == str(ready)
    assert set(provenance[0]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    samples = [
        [
            [float(logprob) for ((logprob, _),) in json.loads(line)["responses"]]
            for line in (home / name / "samples_tiny_choice.jsonl").open()
        ]
        for name in ("beside", "whole")
    ]
    np.testing.assert_allclose(samples[0], samples[1], atol=1e-4)


def test_inspection_shows_the_adapter(ready: Path, home: Path) -> None:
    named = home / "named"
    from dataclasses import replace

    adapter = replace(open_adapter(ready), base_model=str(home / "base"))
    write_adapter(adapter, named, to="hf", force=True)
    document = run_json("inspect", named)
    assert document["adapter"] == str(named)
    assert document["path"] == str(home / "base")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["chat", "--adapter", "{ready}", "--prompt", "hi"], 2, "--adapter needs the model"),
        (["chat", "{ready}", "--prompt", "hi"], 3, "does not say which model it belongs to"),
        (["chat", "{base}", "--adapter", "{base}", "--prompt", "hi"], 3, "this is not an adapter"),
        (["chat", "{base}", "--adapter", "nowhere", "--prompt", "hi"], 3, "nowhere: no such file"),
        (["convert", "{base}", "{out}", "--adapter", "{other}"], 3, "belongs to another model"),
        (["convert", "{ready}", "{out}.gguf"], 2, "there is no --to gguf; merge it"),
        (["convert", "{ready}", "{out}", "--to", "mlx", "--bits", "4"], 2, "there is no --bits"),
        (["convert", "{ready}", "{out}", "--verify"], 2, "there is no --verify"),
        (["convert", "{ready}", "{ready}", "--force"], 2, "is or contains the source"),
        (["convert", "{ready}", "{base}"], 2, "already exists and is not empty"),
        (["convert", "{ready}", "{out}", "--dtype", "int8"], 2, "dtype must be one of"),
        (["parity", "{ready}"], 3, "does not say which model it belongs to"),
        (["train", "lora", "model.checkpoint={named}"], 2, "is an adapter already; merge it first"),
        (["train", "tiny", "adapter.rank=4"], 2, "adapter needs a model.checkpoint"),
        (["train", "lora", "model.rope_theta=1e6"], 2, "remove model.rope_theta"),
        (["train", "lora", "adapter.targets=['lm_head']"], 2, "targets must be some of"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], code: int, message: str, ready: Path, home: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from tests.conftest import small_spec

    if arguments[0] == "train" and "torch" not in installed():
        pytest.skip("torch is not installed")
    write_adapter(
        random_adapter(small_spec(hidden_size=32)), tmp_path / "other", to="hf", force=True
    )
    named = replace(open_adapter(ready), base_model=str(home / "base"))
    write_adapter(named, tmp_path / "named", to="hf", force=True)
    paths = {
        "ready": ready, "base": home / "base", "out": tmp_path / "out",
        "other": tmp_path / "other", "named": tmp_path / "named",
    }  # fmt: skip
    done = run_cli(*(text.format(**paths) for text in arguments), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
