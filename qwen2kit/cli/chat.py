"""``qwen2kit chat``: talk to a model, in a terminal, in one shot or through a pipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2kit.cli.drafting import DraftOption, PromptLookupOption
from qwen2kit.cli.model_options import (
    Adapter,
    BackendName,
    CacheBits,
    DeviceName,
    DType,
    WeightBits,
)
from qwen2kit.cli.output import console, emit_json
from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from qwen2kit.chat.session import ChatSession
    from qwen2kit.cli.chat_turn import Manner

DEFAULT_MODEL = "Qwen/Qwen2-0.5B-Instruct"


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Directory, GGUF file, run directory or hub id; default: the latest run under "
            f"./runs, else {DEFAULT_MODEL}."
        ),
    ] = None,
    backend: BackendName = "auto",
    dtype: DType = "auto",
    device: DeviceName = "auto",
    adapter: Adapter = None,
    cache_bits: CacheBits = None,
    weight_bits: WeightBits = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and leave.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus probability mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Most likely tokens kept; 0: all.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    draft: DraftOption = None,
    prompt_lookup: PromptLookupOption = None,
    schema: Annotated[
        Path | None, typer.Option(help="Answer in JSON of the schema in this file.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Answer in text that matches.")] = None,
    tools: Annotated[
        Path | None,
        typer.Option(help="Python file whose functions the model may ask to be called."),
    ] = None,
    yes_tools: Annotated[
        bool, typer.Option("--yes-tools", help="Run what it asks for without asking you.")
    ] = False,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(help="Keep what the model has read in this file, and begin with it."),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Show the text as it is, not as Markdown.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document (with --prompt or a pipe).")
    ] = False,
) -> None:
    """Chat with a model: streaming, multi-turn; /help lists the commands."""
    if greedy and temperature:
        raise ConfigError("--greedy and --temperature contradict each other; give one of them")
    sampling: dict[str, object] = {
        "max_new_tokens": max_new_tokens,
        "temperature": 0.0 if greedy else temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": 1.0 if greedy and repetition_penalty is None else repetition_penalty,
        "seed": seed,
    }
    question = prompt if prompt is not None else _piped()
    if json_output and question is None:
        raise ConfigError("--json needs --prompt TEXT or text on stdin")
    if adapter is not None and model is None:
        raise ConfigError(
            "--adapter needs the model it belongs to: qwen2kit chat MODEL --adapter DIR"
        )
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.cli.chat_open import Extras, cached, open_session
    from qwen2kit.cli.chat_turn import Manner

    session = open_session(
        model if model is not None else _default_model(),
        Extras(adapter, draft, prompt_lookup, schema, regex, tools),
        backend=backend,
        plan=ExecutionPlan(
            device=device, dtype=dtype, cache_bits=cache_bits, weight_bits=weight_bits
        ),
        system=system,
        sampling=sampling,
    )
    manner = Manner(markdown=not plain, yes_tools=yes_tools)
    with cached(session, prompt_cache):
        if question is None:
            from qwen2kit.cli.chat_loop import converse

            converse(session, manner)
        else:
            _answer_once(session, question, manner, json_output)


def _piped() -> str | None:
    """All of stdin if it is a pipe or file, None if it is a terminal."""
    if sys.stdin is None:
        raise ConfigError("stdin is closed; give --prompt, or run in a terminal")
    if sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError("stdin is not UTF-8 text") from None
    if not text.strip():
        raise ConfigError("stdin is empty; pipe a prompt, give --prompt, or run in a terminal")
    return text.removesuffix("\n").removesuffix("\r")


def _default_model() -> str:
    from qwen2kit.weights.locate import latest_run

    run = latest_run(Path("runs"))
    chosen = DEFAULT_MODEL if run is None else str(run)
    console().print(f"no model given; taking {chosen}", markup=False)
    return chosen


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _answer_once(session: ChatSession, question: str, manner: Manner, json_output: bool) -> None:
    from qwen2kit.cli.chat_turn import run_tool, stream_answer, warn_about_controls

    warn_about_controls(session, question)
    if not json_output:
        stream_answer(session, question, manner)
        return
    for piece in session.send(question):
        if not isinstance(piece, str) and manner.yes_tools:
            run_tool(piece)
    answer = session.last
    assert answer is not None
    emit_json(
        {
            "text": answer.text,
            "tool_calls": [
                {"name": call.name, "arguments": call.arguments, "result": result}
                for call, result in answer.calls
            ],
            "tokens": answer.tokens,
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": answer.cached_tokens,
            "drafted_tokens": answer.drafted,
            "accepted_tokens": answer.accepted,
            "context_limit": answer.context_limit,
            "finish_reason": answer.finish_reason,
            "seconds": round(answer.seconds, 4),
            "first_token_seconds": round(answer.first_token_seconds, 4),
            "tokens_per_second": round(answer.tokens_per_second, 2),
            "model": str(session.loaded.checkpoint.path),
            "adapter": _text(session.loaded.checkpoint.adapter),
            "backend": session.loaded.backend.name,
        }
    )
