"""Recipes: strictness, errors, inheritance, overrides, and the shipped files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.config import data_tree, train_tree
from qwen2kit.config.data_tree import AlpacaFormat, JsonlData
from qwen2kit.config.freeze import differences, freeze, to_tree
from qwen2kit.config.load import load_recipe, parse, shipped
from qwen2kit.config.train_tree import WSD, Linear, TrainConfig
from qwen2kit.config.tree import ModelConfig, RunConfig
from qwen2kit.errors import ConfigError

MINIMAL = """
name = "x"
task = "sft"
seq_len = 64
[model]
preset = "tiny"
tokenizer = "train"
[data]
kind = "embedded"
[train]
steps = 3
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def nodes(cls: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Every dataclass reachable from ``cls`` through its annotations."""
    if dataclasses.is_dataclass(cls) and cls.__name__ not in found:  # type: ignore[union-attr]
        found[cls.__name__] = cls  # type: ignore[union-attr]
        for hint in typing.get_type_hints(cls, include_extras=True).values():
            nodes(hint, found)
    for argument in typing.get_args(cls):
        nodes(argument, found)
    return found


def test_every_node_refuses_unknown_keys_and_is_frozen() -> None:
    found = nodes(RunConfig, {})
    assert {"RunConfig", "JsonlData", "ShareGPTFormat", "WSD", "AdamWConfig"} <= found.keys()
    for module in (data_tree, train_tree):
        declared = {n for n, v in vars(module).items() if dataclasses.is_dataclass(v)}
        assert declared <= found.keys(), declared - found.keys()
    for name, cls in found.items():
        assert cls.__pydantic_config__ == {"extra": "forbid", "allow_inf_nan": False}, name
        assert cls.__dataclass_params__.frozen, name


@pytest.mark.parametrize("recipe", shipped())
def test_shipped_recipes_load_and_survive_json(recipe: str) -> None:
    config = load_recipe(recipe)
    assert parse(json.loads(json.dumps(to_tree(config))), source="again") == config


def test_recipes_hold_the_figures_of_the_report() -> None:
    pretrain, sft = load_recipe("pretrain"), load_recipe("sft")
    assert pretrain.train.optimizer.betas == (0.9, 0.95)
    assert pretrain.train.optimizer.eps == 1e-8
    assert pretrain.train.schedule.kind == "cosine"
    assert pretrain.train.schedule.min_ratio == 0.1
    assert (pretrain.seq_len, pretrain.dtype) == (4096, "bfloat16")
    assert (sft.train.epochs, sft.seq_len, sft.train.lr) == (2, 32768, 7e-6)
    assert sft.train.schedule == Linear(warmup=0.0, min_ratio=0.1)
    for config in (pretrain, sft):
        assert config.train.optimizer.weight_decay == 0.1
        assert config.train.optimizer.max_grad_norm == 1.0


def test_all_errors_come_at_once_with_dotted_paths() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            "tiny",
            [
                "train.lrr=1",
                "train.optimizer.beta=3",
                "seq_len=abc",
                "train.schedule.kind=cubic",
                "data.sed=1",
                "train.steps='3'",
                "task=rlhf",
            ],
        )
    message = str(caught.value)
    for part in (
        "train.lrr: unknown key",
        "train.optimizer.beta: unknown key",
        "seq_len should be a valid integer, got 'abc'",
        "train.schedule.kind must be one of cosine, linear, wsd, constant, got 'cubic'",
        "data.sed: unknown key",
        "train.steps",
        "task should be 'pretrain' or 'sft', got 'rlhf'",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.steps=0", "steps must be at least 1"),
        ("train.lr=nan", "train.lr should be a finite number, got nan"),
        ("model.rope_theta=inf", "model.rope_theta should be a finite number, got inf"),
        ("train.lr=-1.0", "lr must be positive"),
        ("train.micro_batch_rows=3", "must divide"),
        ("train.optimizer.betas=[0.9, 1.0]", "betas must be in"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas"),
        ("train.schedule.warmup=2.0", "warmup is a fraction"),
        ("seq_len=1", "seq_len must be at least 2"),
        ("seq_len=true", "seq_len should be a valid integer"),
        ("eval.questions=301", "must not exceed data.held_out"),
        ("checkpoint.keep=0", "keep must be at least 1"),
        ("eval.fraction=1.5", "fraction must be in"),
        ("data.kind=text data", "data.kind must be one of"),
        ("data.kind=jsonl", "data.paths: missing"),
        ("model.checkpoint=abc", "a checkpoint's shape"),
        ("dtype=float16", "dtype should be"),
        ("name=a/b", "directory name"),
        ("logging.profile_steps=[9999, 9999]", "profile_steps begins after the last step, 2200"),
        ("name.x=1", "not a table"),
        ("train.lr", "must look like"),
        ("=3", "must look like"),
    ],
)
def test_bad_values_are_named(override: str, part: str) -> None:
    overrides = ["model.hidden_size=64", override] if "checkpoint=" in override else [override]
    with pytest.raises(ConfigError, match=part):
        load_recipe("tiny", overrides)


@pytest.mark.parametrize("recipe", ["pretrain", "sft"])
def test_evaluations_without_held_out_data_are_refused(recipe: str) -> None:
    with pytest.raises(ConfigError, match=r"set eval\.fraction or eval\.data") as caught:
        load_recipe(recipe, ["eval.fraction=0"])
    assert "\n" not in str(caught.value)
    assert load_recipe(recipe, ["eval.fraction=0", "eval.every=0"]).eval.every == 0
    other = load_recipe(recipe).data
    given = [f"eval.data={{kind='jsonl', paths=['h.jsonl'], format={_format(other)}}}"]
    assert load_recipe(recipe, ["eval.fraction=0", *given]).eval.data is not None
    assert load_recipe("tiny", ["eval.every=5"]).eval.every == 5  # brings its own


def _format(data: object) -> str:
    assert isinstance(data, JsonlData)
    fields = to_tree(data.format)
    return "{" + ", ".join(f"{key}={value!r}" for key, value in fields.items()) + "}"


def test_missing_keys_and_unknown_tables(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path / "a.toml", "nme = 'x'\n[modl]\nx = 1\n"))
    message = str(caught.value)
    for part in ("nme: unknown key", "modl: unknown key", "model: missing", "data: missing"):
        assert part in message


def test_extends_merges_tables_and_replaces_other_kinds(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", MINIMAL + "[train.schedule]\nkind = 'cosine'\nwarmup = 0.5\n")
    write(
        tmp_path / "mid.toml",
        "extends = ['base.toml']\n[data]\nkind = 'jsonl'\npaths = ['d.jsonl']\n"
        "format = {kind = 'alpaca'}\n",
    )
    config = load_recipe(
        write(
            tmp_path / "top.toml",
            "extends = ['mid.toml']\nseq_len = 32\n[train]\nepochs = 2\n"
            "[train.schedule]\nkind = 'wsd'\n",
        )
    )
    assert config.seq_len == 32
    assert config.data == JsonlData(paths=("d.jsonl",), format=AlpacaFormat())
    assert config.train.schedule == WSD()
    assert (config.train.steps, config.train.epochs) == (None, 2)
    shipped_base = load_recipe(write(tmp_path / "s.toml", "extends = ['tiny']\nname = 'mine'\n"))
    assert shipped_base == dataclasses.replace(load_recipe("tiny"), name="mine")


def test_two_keys_that_exclude_each_other_in_one_file_are_an_error(tmp_path: Path) -> None:
    both = "extends = ['tiny.toml']\n[train]\nsteps = 7\nepochs = 2\n"
    with pytest.raises(ConfigError, match="exactly one of steps and epochs"):
        load_recipe(write(tmp_path / "a.toml", both))
    one = load_recipe(write(tmp_path / "b.toml", "extends = ['tiny.toml']\n[train]\nepochs = 2\n"))
    assert (one.train.steps, one.train.epochs) == (None, 2)


def test_extends_in_a_circle_and_broken_files(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", "extends = ['b.toml']\n")
    write(tmp_path / "b.toml", "extends = ['a.toml']\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_recipe(tmp_path / "a.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(write(tmp_path / "c.toml", "name = \n"))
    with pytest.raises(ConfigError, match="list of file names"):
        load_recipe(write(tmp_path / "d.toml", "extends = 'a.toml'\n"))
    with pytest.raises(ConfigError, match=r"no recipe 'nope'.*tiny"):
        load_recipe("nope")
    (tmp_path / "e.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(tmp_path / "e.toml")


def test_overrides_are_typed_as_toml_and_bare_words_are_strings() -> None:
    config = load_recipe(
        "tiny",
        [
            "train.lr=1e-5",
            "train.optimizer.betas=[0.8, 0.9]",
            "eval.questions=0",
            "data.paths=['a.jsonl']",  # of the new kind, which removes what the old one had
            "data.format.kind=sharegpt",
            "data.kind=jsonl",
            "name=run one",
            "train.epochs=2",
        ],
    )
    assert config.train.lr == 1e-5
    assert config.train.optimizer.betas == (0.8, 0.9)
    assert (config.data.kind, config.data.format.kind) == ("jsonl", "sharegpt")
    assert config.name == "run one"
    assert config.train.steps is None


def test_nodes_check_themselves_in_python_too() -> None:
    with pytest.raises(ConfigError, match="exactly one of preset and checkpoint"):
        ModelConfig()
    with pytest.raises(ConfigError, match="exactly one of steps and epochs"):
        TrainConfig(steps=1, epochs=1)
    with pytest.raises(ConfigError, match="task sft needs conversations"):
        RunConfig(
            name="x",
            model=ModelConfig(preset="tiny", tokenizer="train"),
            data=JsonlData(paths=("a",)),
            task="sft",
            seq_len=8,
            train=TrainConfig(steps=1),
        )


def test_freeze_and_differences() -> None:
    config = load_recipe("tiny")
    other = load_recipe("tiny", ["train.lr=1e-5", "data.seed=3"])
    assert differences(to_tree(config), to_tree(config)) == []
    assert differences(to_tree(config), to_tree(other)) == ["data.seed", "train.lr"]
    frozen = json.loads(json.dumps(freeze(config, {"torch": "9"})))
    assert parse(frozen["config"], source="x") == config
    assert frozen["versions"]["torch"] == "9"
    assert {"numpy", "qwen2kit", "tokenizers"} <= frozen["versions"].keys()
    assert frozen["platform"]


def test_the_tree_needs_no_pydantic_and_no_numpy() -> None:
    code = (
        "import sys; import qwen2kit.config.tree, qwen2kit.config.load; "
        "print([m for m in ('pydantic', 'numpy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
