"""``qwen2kit plan`` as a user runs it, without torch and without network."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from tests.run_cli import run_cli, run_json

NO_TORCH = "torch,mlx,transformers"

PLAN_KEYS = {
    "parallel", "schedule", "micro_batch_rows", "micro_batches", "recompute", "fits", "memory",
    "seconds", "tokens_per_second", "mfu", "tokens", "days", "reasons", "toml",
}  # fmt: skip
PHASE_KEYS = {
    "name", "proposed", "seq_len", "batch_rows", "tokens_per_step", "dtype", "flops_per_token",
    "plan", "alternatives", "notes",
}  # fmt: skip
MEMORY_KEYS = {
    "stages", "layers", "weights", "gradients", "optimizer", "activations", "logits", "other",
    "allocated", "on_device", "moment",
}  # fmt: skip
CLUSTER_KEYS = {
    "gpu", "gpus", "gpus_per_node", "memory_bytes", "bf16_flops", "memory_bandwidth",
    "link_bandwidth", "network_bandwidth",
}  # fmt: skip
SECONDS_KEYS = {
    "matmul", "attention", "head", "elementwise", "recompute", "launch", "communication",
    "bubble", "optimizer", "total",
}  # fmt: skip


def check_plan(plan: dict[str, Any]) -> None:
    assert set(plan) == PLAN_KEYS
    assert set(plan["seconds"]) == SECONDS_KEYS
    assert all(set(entry) == MEMORY_KEYS for entry in plan["memory"])


def test_json_schema() -> None:
    document = run_json("plan", "qwen2-72b", "--gpus", 64, "--tokens", "7e12", hide=NO_TORCH)
    assert set(document) == {"parameters", "cluster", "phases", "days", "fits"}
    assert document["parameters"] == {
        "total": 72_706_203_648, "activated": 72_706_203_648, "trainable": 72_706_203_648,
    }  # fmt: skip
    assert set(document["cluster"]) == CLUSTER_KEYS
    (phase,) = document["phases"]
    assert set(phase) == PHASE_KEYS
    for plan in (phase["plan"], *phase["alternatives"]):
        check_plan(plan)
    assert phase["proposed"]
    assert document["fits"]
    plan = phase["plan"]
    assert plan["days"] == pytest.approx(7e12 / plan["tokens_per_second"] / 86_400)
    assert document["days"] == plan["days"]


def test_the_pasted_lines_give_the_same_plan() -> None:
    proposed = run_json("plan", "qwen2-7b", "--gpus", 16, "--gpu", "a100-80g")
    plan = proposed["phases"][0]["plan"]
    lines = tomllib.loads(plan["toml"])
    changes = [
        f'{table}.{key}="{value}"' if isinstance(value, str) else f"{table}.{key}={value}"
        for table, values in lines.items()
        for key, value in values.items()
    ]
    again = run_json("plan", "qwen2-7b", *changes, "--gpus", 16, "--gpu", "a100-80g")
    phase = again["phases"][0]
    assert not phase["proposed"]
    assert phase["plan"] == plan


def test_tables_are_for_people() -> None:
    done = run_cli("plan", "pretrain", "--gpus", 8, hide=NO_TORCH)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for text in ("494.03 M parameters", "[parallel]", "dp_shard = 8", "optimizer", "tokens/s"):
        assert text in done.stderr


def test_recipe_counting_epochs_has_no_days() -> None:
    document = run_json("plan", "sft", "--gpus", 8, cold=True)
    assert document["days"] is None
    assert run_json("plan", "sft", "--gpus", 8, "--tokens", "1e9")["days"] > 0


def test_adapters() -> None:
    document = run_json("plan", "qlora", "--gpus", 1, "--gpu", "NVIDIA GeForce RTX 4090")
    assert document["cluster"]["gpu"] == "rtx-4090"
    assert document["parameters"]["trainable"] < 0.03 * document["parameters"]["total"]
    assert document["fits"]


def test_a_long_phase_has_a_plan_of_its_own() -> None:
    document = run_json(
        "plan", "pretrain", "long.fraction=0.1", "long.seq_len=32768", "long.rope_theta=1e6",
        "--gpus", 8, "--tokens", "1e12",
    )  # fmt: skip
    first, second = document["phases"]
    assert (first["name"], second["name"]) == ("training", "long")
    assert first["plan"]["tokens"] + second["plan"]["tokens"] == pytest.approx(1e12)
    assert document["days"] == first["plan"]["days"] + second["plan"]["days"]
    assert set(tomllib.loads(first["plan"]["toml"])) == {"train", "parallel"}
    assert set(tomllib.loads(second["plan"]["toml"])["long"]) == {
        "micro_batch_rows", "recompute", "parallel",
    }  # fmt: skip


def test_pipeline_stages_are_told_apart() -> None:
    document = run_json(
        "plan", "qwen2-72b", "parallel.pp=4", "parallel.tp=8", "train.recompute=full",
        "train.micro_batch_rows=1", "--gpus", 64,
    )  # fmt: skip
    entries = document["phases"][0]["plan"]["memory"]
    assert [stage for entry in entries for stage in entry["stages"]] == [0, 1, 2, 3]
    assert sum(entry["layers"] * len(entry["stages"]) for entry in entries) == 80


ERRORS = {
    "indivisible heads": (
        ["qwen2-7b", "parallel.tp=8", "--gpus", "8"],
        "tp=8 does not divide num_attention_heads=28",
    ),
    "wrong product": (
        ["qwen2-7b", "parallel.dp_shard=4", "--gpus", "8"],
        "needs 4 processes, but 8 are running",
    ),
    "micro-batches": (
        ["qwen2-7b", "parallel.dp_shard=8", "train.micro_batch_rows=256", "--gpus", "8"],
        "micro_batch_rows=256 does not divide the 128 rows",
    ),
    "too large": (
        ["qwen2-72b", "--gpus", "8"],
        "take 16 GPUs; or train adapters instead",
    ),
    "explicit and too large": (
        ["qwen2-7b", "parallel.dp_shard=2", "--gpus", "2"],
        "use one of the alternatives",
    ),
    "unknown gpu": (["tiny", "--gpus", "1", "--gpu", "h1000"], "unknown GPU 'h1000'"),
    "no float8": (
        ["qwen2-7b", "train.float8=true", "--gpus", "8", "--gpu", "a100-80g"],
        "no float8",
    ),
    "half a node": (["qwen2-7b", "--gpus", "12"], "not whole nodes of 8"),
    "no gpu": (["qwen2-7b", "--gpus", "0"], "--gpus"),
    "tokens": (["qwen2-7b", "--gpus", "8", "--tokens", "-1"], "--tokens must be"),
    "no such recipe": (["qwen9", "--gpus", "8"], "no recipe 'qwen9'"),
    "checkpoint elsewhere": (
        ["sft", "model.checkpoint=acme/other", "--gpus", "8"],
        "acme/other is not on this disk",
    ),
    "rows that cannot be shared": (
        ["qwen2-0.5b", "--gpus", "31", "--gpus-per-node", "31"],
        "31 GPUs cannot share batch_rows=1024",
    ),
    "adapters and pipelines": (
        ["qlora", "parallel.pp=2", "--gpus", "2"],
        "adapters train with data and context parallelism only",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case: str) -> None:
    arguments, message = ERRORS[case]
    done = run_cli("plan", *arguments, "--json")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
