"""``qwen2kit parity``: do all implementations compute the same model?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qwen2kit.cli.model_options import Model
from qwen2kit.cli.output import console, emit_json
from qwen2kit.errors import ConfigError, ParityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2kit.parity.compare import PairResult
    from qwen2kit.parity.peers import Choice
    from qwen2kit.weights.checkpoint import Checkpoint


def parity(
    model: Model,
    backends: Annotated[
        str, typer.Option(help="Our backends, comma-separated; auto: every installed one.")
    ] = "auto",
    peers: Annotated[
        str, typer.Option(help="auto, none, or a list such as transformers,mlx-lm.")
    ] = "auto",
    tolerance: Annotated[float, typer.Option(help="Largest allowed |difference| of logits.")] = (
        1e-3
    ),
    dtype: Annotated[str, typer.Option(help="Compute dtype of every implementation.")] = "float32",
    max_tokens: Annotated[
        int | None, typer.Option(help="Add a long prompt of this many tokens, e.g. 2048.")
    ] = None,
    greedy: Annotated[int, typer.Option(help="Greedy tokens per prompt; 0: none.")] = 128,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Compare logits and greedy text of our backends, transformers and mlx-lm, pair by pair."""
    from qwen2kit.backend.registry import installed
    from qwen2kit.parity.compare import compare_all
    from qwen2kit.parity.peers import choose
    from qwen2kit.parity.prompts import prompt_set
    from qwen2kit.weights.checkpoint import open_checkpoint
    from qwen2kit.weights.locate import locate

    _check_options(tolerance, dtype, greedy)
    ours = installed() if backends == "auto" else _names(backends)
    theirs = {"auto": None, "none": ()}.get(peers, None if peers == "auto" else _names(peers))
    checkpoint = open_checkpoint(locate(model))
    choice = choose(checkpoint, backends=ours, peers=theirs, dtype=dtype)
    _check_choice(choice, asked=() if backends == "auto" else ours)
    prompts = prompt_set(
        checkpoint.tokenizer(),
        max_tokens=max_tokens,
        context=checkpoint.spec.context_length,
    )
    with console().status("") as status:
        results = compare_all(
            checkpoint,
            choice.loaders,
            prompts,
            dtype=dtype,
            tolerance=tolerance,
            greedy_tokens=greedy,
            progress=status.update,
        )
    if json_output:
        emit_json(_document(checkpoint, choice, results, tolerance, dtype))
    _print(results, choice, tolerance)
    _verdict(results, tolerance)


def _check_options(tolerance: float, dtype: str, greedy: int) -> None:
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"--tolerance must be a number of at least 0, got {tolerance}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if greedy < 0:
        raise ConfigError(f"--greedy must not be negative, got {greedy}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _check_choice(choice: Choice, asked: Sequence[str]) -> None:
    """A backend named on the command line must take part, and it takes two to compare."""
    for name in asked:
        if name in choice.not_applicable:
            raise ConfigError(f"{name} cannot take part: {choice.not_applicable[name]}")
    if len(choice.loaders) < 2:
        present = ", ".join(loader.name for loader in choice.loaders) or "none"
        reasons = "; ".join(f"{name}: {why}" for name, why in choice.not_applicable.items())
        raise ConfigError(
            f"parity needs two implementations, but only has: {present}"
            + (f" (not applicable: {reasons})" if reasons else "")
        )


def _document(
    checkpoint: Checkpoint,
    choice: Choice,
    results: list[PairResult],
    tolerance: float,
    dtype: str,
) -> dict[str, object]:
    return {
        "model": str(checkpoint.path),
        "format": checkpoint.format,
        "dtype": dtype,
        "tolerance": tolerance,
        "implementations": [loader.name for loader in choice.loaders],
        "not_applicable": choice.not_applicable,
        "passed": all(result.passed for result in results),
        "pairs": [result.to_dict() for result in results],
    }


def _print(results: list[PairResult], choice: Choice, tolerance: float) -> None:
    from rich.table import Table

    out = console()
    for result in results:
        table = Table(title=f"{result.first} / {result.second}, tolerance {tolerance:g}")
        for heading in ("prompt", "max |Δ|", "median |Δ|", "KL (nats)", "top-1", "greedy", ""):
            table.add_column(heading, justify="left" if heading == "prompt" else "right")
        for name, delta in result.prompts.items():
            run = result.greedy.get(name)
            table.add_row(
                name, f"{delta.max_abs:.2e}", f"{delta.median_abs:.2e}", f"{delta.kl:.2e}",
                f"{delta.top1_agreement:.2%}", "" if run is None else f"{run.common}/{run.length}",
                "ok" if delta.within(tolerance) else "FAIL",
            )  # fmt: skip
        out.print(table)
    for result in results:
        for name, run in result.greedy.items():
            if not run.identical:
                out.print(
                    f"{result.first} / {result.second}: greedy text of {name} parts after "
                    f"{run.common} tokens, where {result.first}'s logits are {run.gap:.2e} apart",
                    markup=False,
                )
    for name, reason in choice.not_applicable.items():
        out.print(f"not applicable: {name}: {reason}", markup=False)


def _verdict(results: list[PairResult], tolerance: float) -> None:
    failed = [result for result in results if not result.passed]
    if not failed:
        return
    worst = max(failed, key=lambda result: result.total.max_abs)
    if worst.total.within(tolerance):
        raise ParityError(
            f"{worst.first} and {worst.second} agree on logits but not on greedy text: cached "
            "decoding differs from the full forward pass"
        )
    where = "" if worst.divergence is None else f"; first difference: {worst.divergence.where}"
    raise ParityError(
        f"{worst.first} and {worst.second} differ by up to {worst.total.max_abs:.3g} in logits, "
        f"tolerance {tolerance:g}{where} ({len(failed)} of {len(results)} pairs fail)"
    )
