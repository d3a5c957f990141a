"""Samples in the form that the report's sample browser reads: small, prompts stored once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from qwen2kit_evals.stored_run import Sample, StoredRun, numbers


def browser_data(names: Sequence[str], runs: Sequence[StoredRun], limit: int) -> dict[str, Any]:
    """Per task: what all its prompts begin with, and its documents with each run's answers.

    Args:
        names: of the runs.
        limit: most documents per task.

    Returns:
        ``{"runs": [...], "tasks": [{"name", "prefix", "total", "docs": [{"id", "prompt",
        "prompts", "target", "answers": [answer or null per run]}]}]}``: ``prompt`` is the first
        run's, ``prompts`` how many different ones the runs had.
    """
    tasks: dict[str, None] = {}
    for run in runs:
        tasks |= dict.fromkeys(run.samples)
    return {"runs": list(names), "tasks": [_task(task, runs, limit) for task in tasks]}


def _task(task: str, runs: Sequence[StoredRun], limit: int) -> dict[str, Any]:
    answers: dict[int, list[dict[str, Any] | None]] = {}
    firsts: dict[int, Sample] = {}
    hashes: dict[int, set[str]] = {}
    for number, run in enumerate(runs):
        for sample in run.samples.get(task, ()):
            row = answers.setdefault(sample["doc_id"], [None] * len(runs))
            firsts.setdefault(sample["doc_id"], sample)
            hashes.setdefault(sample["doc_id"], set()).add(sample["prompt_hash"])
            row[number] = _merged(row[number], sample)
    kept = sorted(answers)[:limit]
    prompts = [_prompt(firsts[doc]) for doc in kept]
    prefix = _whole_lines(_common(prompts)) if len(prompts) > 1 else ""
    docs = [
        {
            "id": doc,
            "prompt": prompt[len(prefix) :],
            "prompts": len(hashes[doc]),
            "target": str(firsts[doc]["target"]),
            "answers": answers[doc],
        }
        for doc, prompt in zip(kept, prompts, strict=True)
    ]
    return {"name": task, "prefix": prefix, "total": len(answers), "docs": docs}


def _prompt(sample: Sample) -> str:
    return _common([str(arguments[0]) for arguments in sample["arguments"]])


def _common(texts: Sequence[str]) -> str:
    """What all ``texts`` begin with: what the first and the last in order do."""
    first, last = min(texts), max(texts)
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return first[: sum(1 for _ in equal)]


def _whole_lines(text: str) -> str:
    """``text`` up to its last blank line, where one example ends and another begins."""
    return text[: text.rfind("\n\n") + 2] if "\n\n" in text else ""


def _merged(before: Mapping[str, Any] | None, sample: Sample) -> dict[str, Any]:
    """A run's answer to a document; each answer filter adds its reading and metrics."""
    scores = numbers(sample)
    suffix = "" if sample["filter"] == "none" else f" ({sample['filter']})"
    named = {name + suffix: round(value, 4) for name, value in scores.items()}
    rights = [value == 1 for value in scores.values() if value in (0.0, 1.0)]
    entry = dict(before) if before is not None else {"metrics": {}, "right": None, **_given(sample)}
    entry["metrics"] = entry["metrics"] | named
    if rights and entry["right"] is None:
        entry["right"] = rights[0]
    return entry


def _given(sample: Sample) -> dict[str, Any]:
    """The generated text, or the choices with their log-probabilities in nats."""
    responses = [response for given in sample["responses"] for response in given]
    if responses and isinstance(responses[0], str):
        return {"text": "\n---\n".join(responses)}
    values = [r[0] if isinstance(r, list) else r for r in responses]
    shared = len(_prompt(sample))
    labels = [_label(arguments, shared) for arguments in sample["arguments"]]
    return {"choices": [[label, round(v, 3)] for label, v in zip(labels, values, strict=False)]}


def _label(arguments: Sequence[Any], shared: int) -> str:
    """A choice: what of its prompt the others do not share, and its continuation."""
    return str(arguments[0])[shared:] + str(arguments[1]) if len(arguments) > 1 else "whole text"
