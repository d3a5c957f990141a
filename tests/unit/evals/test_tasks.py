"""Choosing tasks: everything wrong with names, data or packages is one line, before any model."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.errors import BackendError, ConfigError, DataError, MissingExtra, Qwen2KitError
from qwen2kit_evals import tasks
from qwen2kit_evals.listing import available_tasks
from qwen2kit_evals.local_data import LocalData
from qwen2kit_evals.tasks import TaskSelection, select_tasks, task_manager
from tests.unit.evals.test_local_data import write_set

BASE: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "exact_match"}],
    "metadata": {"version": 1.0},
}
TASKS: dict[str, dict[str, Any]] = {
    "whole": {"dataset_path": "org/one", "dataset_name": "main", "test_split": "test"},
    "shots": {
        "dataset_path": "org/one",
        "dataset_name": "main",
        "training_split": "train",
        "validation_split": "validation",
        "num_fewshot": 1,
    },
    "no_train": {
        "dataset_path": "org/part",
        "training_split": "train",
        "validation_split": "validation",
    },
    "no_test": {"dataset_path": "org/part", "test_split": "test"},
    "no_config": {"dataset_path": "org/part", "dataset_name": "full", "test_split": "test"},
    "absent": {"dataset_path": "org/absent", "test_split": "test"},
    "absent_too": {"dataset_path": "org/absent", "test_split": "test"},
    "unsafe": {"dataset_path": "org/one", "test_split": "test", "unsafe_code": True},
    "tagged_a": {"dataset_path": "org/one", "test_split": "test", "tag": ["both"]},
    "tagged_b": {"dataset_path": "org/one", "test_split": "test", "tag": ["both"]},
}
GROUPS: dict[str, list[Any]] = {
    "pair": ["whole", {"task": "tagged_a", "num_fewshot": 0}],
    "nested": ["pair", {"group": "inline", "task": ["tagged_b"]}],
    "broken": ["whole", "absent"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("select")
    write_set(home / "hub", "org/one", {"main": {"train": 3, "test": 2, "validation": 2}})
    write_set(home / "hub", "org/part", {"sample": {"validation": 2}})
    files = home / "tasks"
    files.mkdir()
    for name, config in TASKS.items():
        (files / f"{name}.yaml").write_text(json.dumps(BASE | config | {"task": name}))
    for name, members in GROUPS.items():
        (files / f"_{name}.yaml").write_text(json.dumps({"group": name, "task": members}))
    for name, package in {"langs": "langdetect", "maths": "math_verify_absent"}.items():
        (files / f"{name}_code.py").write_text(
            f"raise ModuleNotFoundError('No module', name={package!r})"
        )
        config = json.dumps(BASE | TASKS["whole"] | {"task": name})
        text = f'{config[:-1]}, "process_results": !function {name}_code.run}}'
        (files / f"{name}.yaml").write_text(text)
    return home


def select(home: Path, *names: str, **options: Any) -> TaskSelection:
    options = {"datasets": home / "hub", "include_path": home / "tasks"} | options
    return select_tasks(names, defaults=False, **options)


def test_lm_evals_own_tasks_are_read_only_where_one_is_asked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bool] = []
    manager = tasks.TaskManager

    def watched(include_path: list[str], include_defaults: bool) -> Any:
        read.append(include_defaults)
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", watched)

    def reads(*names: str) -> bool:
        read.clear()
        with contextlib.suppress(Qwen2KitError):
            select_tasks(names, datasets=home / "hub", include_path=home / "tasks")
        return any(read)

    assert not reads("whole,shots", "tagged_a")
    assert not reads("broken")
    assert not reads(" ")
    for further in ("gsm8k", "who*", "pair", "nested", "whole,mmlu", "both"):
        assert reads(further), further


def built(selection: TaskSelection) -> dict[str, Any]:
    return dict(selection.manager.load(list(selection.objects))["tasks"])


def test_names_groups_tags_globs_and_commas(home: Path) -> None:
    assert set(built(select(home, "whole,shots"))) == {"whole", "shots"}
    assert set(built(select(home, "nested"))) == {"whole", "tagged_a", "tagged_b"}
    assert set(built(select(home, "both"))) == {"tagged_a", "tagged_b"}
    assert select(home, "tagged_?").names == ("tagged_a", "tagged_b")


def test_unknown_names_come_with_close_ones(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'whol'; did you mean whole\?"):
        select(home, "whol")
    with pytest.raises(ConfigError, match="no task given"):
        select(home, "")
    with pytest.raises(ConfigError, match="Duplicate task 'whole'"):
        select(home, "pair,whole")


def test_all_absent_data_is_named_with_its_tasks(home: Path) -> None:
    with pytest.raises(DataError) as caught:
        select(home, "whole", "absent", "absent_too", "broken")
    message = str(caught.value)
    assert f"org/absent (task absent, absent_too, broken) is absent: expected {home}" in message
    assert "\n" not in message


def test_unneeded_split_is_dropped_with_a_notice(home: Path) -> None:
    selection = select(home, "no_train")
    task = built(selection)["no_train"]
    assert task.config.training_split is None
    assert len(task.eval_docs) == 2
    assert len(selection.notices) == 2
    assert "reads config 'sample', the only one" in selection.notices[0]
    assert "split 'train' is absent" in selection.notices[1]
    assert select(home, "whole", "shots").notices == ()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_train", {"num_fewshot": 3}, "no_train draws its 3 shots from split 'train'"),
        ("no_test", {}, "no_test evaluates split 'test'"),
        ("no_config", {}, "no_config: .* has no config 'full'; present: sample"),
    ],
)
def test_needed_data_that_is_absent(
    home: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        select(home, name, **options)


def test_missing_packages_and_unsafe_tasks(home: Path) -> None:
    with pytest.raises(MissingExtra, match=r"'langdetect' .* 'qwen2kit\[eval\]'"):
        select(home, "langs")
    with pytest.raises(BackendError, match=r"maths needs .*pip install math-verify-absent"):
        select(home, "maths")
    with pytest.raises(ConfigError, match="runs programs that the model wrote"):
        select(home, "unsafe")


def test_broken_task_files_are_one_line(home: Path, tmp_path: Path) -> None:
    config = BASE | TASKS["whole"] | {"task": "odd", "doc_to_text": "{{ text | no_such_filter }}"}
    (tmp_path / "odd.yaml").write_text(json.dumps(config))
    with pytest.raises(Qwen2KitError, match="task odd cannot be built") as caught:
        select(home, "odd", include_path=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such directory"):
        select(home, "odd", include_path=tmp_path / "none")


def test_listing_offers_what_the_data_serves(home: Path) -> None:
    offers = available_tasks(LocalData(home / "hub"), task_manager(home / "tasks", defaults=False))
    names = {offer.name: offer for offer in offers}
    assert {"pair", "nested", "shots", "no_train"} <= set(names)
    assert not {"absent", "broken", "no_config"} & set(names)
    assert names["nested"].tasks == 3
    assert names["pair"].data == ("org/one",)
