"""``qwen2kit eval code``: pass@k on a file of programming problems; programs run in a sandbox."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen2kit.cli.eval_model import BatchSize, ChatTemplate, Json, Output, load, numbers_of
from qwen2kit.cli.model_options import Adapter, BackendName, DeviceName, DType, Model
from qwen2kit.cli.output import console, emit_json, show_notes
from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qwen2kit_evals.code_eval import CodeEval

Consent = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution", help="Run the programs that the model writes, in a sandbox."
    ),
]
Weak = Annotated[
    bool,
    typer.Option("--weak-sandbox", help="Run them even where the sandbox cannot hold them."),
]


def code(
    model: Model,
    problems: Annotated[
        Path, typer.Option(help="JSONL: fields of HumanEval, EvalPlus or MultiPL-E (Python).")
    ],
    allow_code_execution: Consent = False,
    weak_sandbox: Weak = False,
    samples: Annotated[int, typer.Option(min=1, help="Programs per problem.")] = 1,
    k: Annotated[str, typer.Option("--k", help="The k of pass@k: 1,10.")] = "1",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of sampling.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each program.")] = 512,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time limit of each program.")] = 3.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first problems.")] = None,
    backend: BackendName = "auto",
    dtype: DType = "auto",
    device: DeviceName = "auto",
    adapter: Adapter = None,
    batch_size: BatchSize = None,
    chat_template: ChatTemplate = False,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    output: Output = None,
    json_output: Json = False,
) -> None:
    """Have the model complete programs, run their tests, estimate pass@k."""
    runner = code_runner(allow_code_execution, weak_sandbox, seconds=seconds)
    if runner is None:
        raise ConfigError("this runs programs that the model wrote: add --allow-code-execution")
    from dataclasses import asdict

    from qwen2kit_evals.code_eval import execution_notice
    from qwen2kit_evals.code_problems import read_problems
    from qwen2kit_evals.code_run import CodeOptions, run_problems, scores
    from qwen2kit_evals.results import default_output
    from qwen2kit_evals.run_directory import RunDirectory, settings_of

    chosen = read_problems(problems)[:limit]
    options = CodeOptions(
        samples=samples, k=tuple(int(size) for size in numbers_of(k, "--k")), top_p=top_p,
        temperature=temperature, max_tokens=max_tokens, chat=chat_template, seed=seed,
    )  # fmt: skip
    loaded = load(model, backend=backend, dtype=dtype, device=device, adapter=adapter)
    settings = settings_of(
        "code", loaded, problems=str(problems.resolve()), limit=limit, seconds=seconds,
        **asdict(options),
    )  # fmt: skip
    with RunDirectory(output or default_output(model, "code"), settings) as run:
        rows = run_problems(loaded, chosen, runner, options, log=run.log, batch_size=batch_size)
        document: dict[str, Any] = {
            "scores": scores(rows, options.k),
            "code_execution": runner.document(),
            "settings": settings,
            "output": str(run.path),
        }
        run.finish(document, rows)
    _print(document["scores"], execution_notice(runner))
    console().print(f"written to {run.path}", markup=False)
    if json_output:
        emit_json(document)


def code_runner(allowed: bool, weak: bool, *, seconds: float = 3.0) -> CodeEval | None:
    """What runs generated programs; None without consent.

    Raises:
        ConfigError: ``weak`` without consent.
        BackendError: programs cannot be isolated here, and ``weak`` does not accept that.
    """
    if weak and not allowed:
        raise ConfigError("--weak-sandbox means nothing without --allow-code-execution")
    if not allowed:
        return None
    from qwen2kit_evals.code_eval import CodeEval
    from qwen2kit_evals.sandbox.limits import Limits
    from qwen2kit_evals.sandbox.probe import strongest_sandbox

    isolation = strongest_sandbox(Limits(seconds=seconds), weak=weak)
    if isolation.breaches:
        show_notes([f"programs are not isolated: they can {', '.join(isolation.breaches)}"])
    return CodeEval(isolation)


def _print(scores: Sequence[Mapping[str, Any]], notice: str) -> None:
    from rich.table import Table

    table = Table(title="Programs that pass", title_justify="left")
    for name in ("tests", "metric", "value", "stderr", "problems"):
        table.add_column(name, justify="left" if name in ("tests", "metric") else "right")
    for score in scores:
        error = score["stderr"]
        table.add_row(
            score["tests"],
            score["metric"],
            f"{score['value']:.4f}",
            "" if error is None else f"±{error:.4f}",
            str(score["problems"]),
        )
    console().print(table)
    console().print(notice, markup=False)
