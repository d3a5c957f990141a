"""``qwen2kit demo``: everything once, on the embedded corpus: train, convert, chat, evaluate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen2kit.cli.output import console, emit_json
from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit.config.tree import RunConfig
    from qwen2kit.data.embedded import Question


LM_EVAL_QUESTIONS = 100


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the tiny recipe."),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="New directory; default runs/demo-<time>.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Train a tiny model, convert it, chat with it and evaluate it on every installed backend."""
    from time import perf_counter

    from qwen2kit.backend.registry import get, installed
    from qwen2kit.cli.demo_steps import convert_and_verify
    from qwen2kit.cli.demo_task import task_rows, write_tasks
    from qwen2kit.config.load import load_recipe
    from qwen2kit.data.embedded import generate
    from qwen2kit.train import run

    started = perf_counter()
    os.environ.setdefault("TQDM_DISABLE", "1")  # this command reports its own progress
    config = load_recipe("tiny", [*(overrides or []), "checkpoint.initial=true"])
    seed, count = _questions_of(config)
    questions = tuple(generate(seed, count, held_out=True))
    out = directory or _fresh()
    backends = installed()
    for name in (config.backend, *backends):
        get(name)
    rows = task_rows(questions)[:LM_EVAL_QUESTIONS] if _has_lm_eval() else []
    screen = console()

    def note(text: str) -> None:
        screen.print(text, markup=False, soft_wrap=True)

    note(f"training in {out}")
    trained = run.start(config, run_dir=out, console=screen)
    if trained.status != "finished":
        note(f"stopped by {trained.signal}; continue with: qwen2kit train --resume {out}")
        raise typer.Exit(130)
    if rows:
        write_tasks(out / "eval" / "tasks", rows)
    else:
        note("lm-eval is not installed, so it is left out: pip install 'qwen2kit[eval]'")
    conversions = convert_and_verify(trained.model_dir, out, backends, note)
    document = {
        "directory": str(out),
        "training": trained.to_json(),
        "conversions": conversions,
        **_measure(out, backends, questions, note),
        "seconds": round(perf_counter() - started, 1),
    }
    _write(out / "demo.json", document)
    _print(document)
    if json_output:
        emit_json(document)


def _measure(
    out: Path, backends: Sequence[str], questions: Sequence[Question], note: Any
) -> dict[str, Any]:
    """Chat, exact match and lm-eval for every model and backend."""
    from qwen2kit.cli.demo_steps import BEFORE, ask, load, models_to_score, score

    chats: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    for label, backend, model_dir in models_to_score(out, backends):
        note(f"evaluating {backend}, {label}")
        loaded = load(model_dir, backend)
        row: dict[str, Any] = {"model": label, "backend": backend, "path": str(model_dir)}
        if label != BEFORE:
            chats.append(row | ask(loaded, questions[0]))
        row["exact_match"] = score(loaded, questions)
        if (out / "eval" / "tasks").is_dir():
            row["lm_eval"] = _lm_eval(loaded, out / "eval", f"{backend}-{label}")
        scores.append(row)
    return {"questions": len(questions), "chat": chats, "scores": scores}


def _lm_eval(loaded: LoadedModel, folder: Path, name: str) -> dict[str, float | None]:
    from qwen2kit.cli.demo_task import METRICS, TASKS
    from qwen2kit_evals.run import evaluate
    from qwen2kit_evals.tasks import select_tasks

    selection = select_tasks(TASKS, include_path=folder / "tasks", defaults=False)
    result = evaluate(
        loaded,
        selection,
        batch_size=64,
        apply_chat_template=True,
        output=folder / name.replace(",", "").replace(" ", "-"),
    )
    return {task: result.value(task, metric) for task, metric in METRICS.items()}


def _has_lm_eval() -> bool:
    from importlib.util import find_spec

    return find_spec("lm_eval") is not None


def _questions_of(config: RunConfig) -> tuple[int, int]:
    """Seed and number of held-out questions of an embedded recipe."""
    from qwen2kit.config.data_tree import EmbeddedData

    if not isinstance(config.data, EmbeddedData) or not config.eval.questions:
        raise ConfigError("the demo asks held-out questions: keep data.kind and eval.questions")
    return config.data.seed, config.eval.questions


def _fresh() -> Path:
    from datetime import datetime

    return Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"


def _write(path: Path, document: dict[str, Any]) -> None:
    from qwen2kit.partial_file import write_text_atomically

    write_text_atomically(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _print(document: dict[str, Any]) -> None:
    from rich.table import Table

    from qwen2kit.cli.demo_task import TASKS

    out = console()
    for chat in document["chat"]:
        out.print(
            f"{chat['backend']} ({chat['model']}): {chat['question']} -> {chat['answer']}"
            f"   (expected {chat['expected']})",
            markup=False,
            soft_wrap=True,
        )
    table = Table(title=f"{document['questions']} held-out questions")
    headings = ["model", "backend", "exact match"]
    asked = min(LM_EVAL_QUESTIONS, document["questions"])
    if any("lm_eval" in row for row in document["scores"]):
        headings += [f"lm-eval generate (n={asked})", f"lm-eval choice (n={asked})"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for row in document["scores"]:
        cells = [_percent(row["exact_match"])]
        cells += [_percent(row["lm_eval"][task]) for task in TASKS if "lm_eval" in row]
        table.add_row(row["model"], row["backend"], *cells)
    out.print(table)
    for report in document["conversions"]:
        out.print(
            f"{report['out']}: {report['bytes'] / 1e6:.2f} MB, verified on "
            f"{' and '.join(report['verified_on'])}",
            markup=False,
            soft_wrap=True,
        )
    out.print(
        f"done in {document['seconds']:.0f} s; all files are in {document['directory']}; "
        f"talk to it: qwen2kit chat {document['directory']}",
        markup=False,
        soft_wrap=True,
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
