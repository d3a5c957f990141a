"""Small lm-eval tasks on invented local data, one for each kind of request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "one", "two", "four"]

CHOICES = [" cat", " dog on the mat", " ran and ran", " four"]
_QUESTIONS = [
    {"text": f"{' '.join(WORDS[i : i + 6])}?{' ' * (i % 3)}", "gold": i % 4, "kind": WORDS[i]}
    for i in range(8)
]
_LONG = [{"text": " ".join(WORDS * (n + 20)), "gold": n % 4, "kind": "long"} for n in range(3)]
_TEXTS = [{"text": " ".join(WORDS * n)} for n in (1, 4, 25)] + [{"text": "émü 猫 🐱 \n\n x"}]

_CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": CHOICES,
    "doc_to_target": "gold",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
_TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": _CHOICE | {"data": _QUESTIONS, "num_fewshot": 2},
    "tiny_long": _CHOICE | {"data": _LONG},
    "tiny_empty": _CHOICE | {"data": _QUESTIONS[:2], "doc_to_text": ""},
    "tiny_rolling": {
        "data": _TEXTS,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_generate": {
        "data": _QUESTIONS,
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{kind}}",
        "num_fewshot": 1,
        "generation_kwargs": {
            "until": ["44", "ur", "what", "<|im_end|>"],
            "max_gen_toks": 24,
            "do_sample": False,
        },
        "metric_list": [{"metric": "exact_match"}],
    },
}
TASK_NAMES = tuple(_TASKS)


def write_tasks(directory: Path, **changes: dict[str, Any]) -> Path:
    """Write task files and their data; ``changes`` are per task name. Returns ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, config in _TASKS.items():
        config = config | changes.get(name, {})
        data = directory / f"{name}.json"
        data.write_text("\n".join(json.dumps(row) for row in config["data"]))
        document = {key: value for key, value in config.items() if key != "data"} | {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "fewshot_split": "test",
            "metadata": {"version": 1.0},
        }
        (directory / f"{name}.yaml").write_text(json.dumps(document, ensure_ascii=False))
    return directory
