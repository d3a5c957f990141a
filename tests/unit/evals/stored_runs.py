"""Small results directories written by hand, for tools that read finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def sample(
    doc: int, metrics: Mapping[str, Any], *, responses: Sequence[Any], prompt: str = "", **more: Any
) -> dict[str, Any]:
    """One line of a samples file; a text for generation, pairs for choices."""
    generated = isinstance(responses[0], str)
    arguments = [[prompt or f"Question {doc}\nAnswer:", {} if generated else f" c{i}"]
                 for i in range(len(responses))]  # fmt: skip
    return {
        "doc_id": doc,
        "filter": "none",
        "arguments": arguments,
        "responses": [[response] for response in responses],
        "filtered": list(responses),
        "target": "0",
        "metrics": dict(metrics),
        "doc_hash": f"d{doc}",
        "prompt_hash": f"p{doc}",
    } | more


def row(task: str, value: float, **more: Any) -> dict[str, Any]:
    """One line of results.json."""
    return {
        "task": task, "group": False, "depth": 0, "metric": "acc", "filter": "none",
        "value": value, "stderr": 0.01, "samples": 4, "shots": 5,
    } | more  # fmt: skip


def write_run(
    directory: Path,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Sequence[Mapping[str, Any]] = (),
    benchmarks: Sequence[Mapping[str, Any]] = (),
    **evaluation: Any,
) -> Path:
    """A finished run."""
    directory.mkdir(parents=True)
    document = {
        "schema_version": 1,
        "results": list(rows),
        "benchmarks": list(benchmarks),
        "notices": [],
        "provenance": {
            "model": {
                "path": f"/models/{directory.name}",
                "format": "hf",
                "backend": "torch",
                "device": "cpu",
                "dtype": "float32",
                "versions": {"lm_eval": "0.4.13"},
            },
            "evaluation": {
                "tasks": list(samples),
                "suite": None,
                "limit": None,
                "chat_template": False,
                "seconds": 1.0,
                "time": "2026-01-01T00:00:00+0000",
            }
            | evaluation,
        },
        "output": str(directory),
    }
    (directory / "results.json").write_text(json.dumps(document))
    for task, lines in samples.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / f"samples_{task}.jsonl").write_text(text)
    return directory
