"""From the options of ``qwen2kit chat`` to a session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwen2kit.cli.drafting import check_guessing, drafter_maker
from qwen2kit.cli.output import console, show_notes
from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.chat.session import ChatSession
    from qwen2kit.engine.request import Constraint


class Extras(NamedTuple):
    """What may come with a model: files and ways to answer, each None if not wanted."""

    adapter: str | None = None
    draft: str | None = None
    prompt_lookup: int | None = None
    schema: Path | None = None
    regex: str | None = None
    tools: Path | None = None


def open_session(
    model: str,
    extras: Extras,
    *,
    backend: str,
    plan: ExecutionPlan,
    system: str | None,
    sampling: dict[str, object],
) -> ChatSession:
    """Load everything, and say what is worth knowing.

    Raises:
        Qwen2KitError: something is wrong with an option or a file; options first, before the
            model is loaded.
    """
    from qwen2kit.backend.loading import load_model
    from qwen2kit.chat.session import ChatSession
    from qwen2kit.chat.tool_functions import load_tools
    from qwen2kit.generate.sampling import Sampling

    Sampling(**{key: value for key, value in sampling.items() if value is not None})  # type: ignore[arg-type]
    with redirect_stdout(sys.stderr):  # running the file may print
        tools = [] if extras.tools is None else load_tools(extras.tools)
    schema = _schema(extras)
    check_guessing(extras.draft, extras.prompt_lookup)
    screen = console()
    with screen.status(f"loading {model}"):
        loaded = load_model(model, backend=backend, plan=plan, adapter=extras.adapter)
        session = ChatSession(
            loaded,
            system=system,
            drafter=drafter_maker(loaded, extras.draft, extras.prompt_lookup),
            grammar=_grammar(loaded, schema, extras.regex),
            **sampling,
        )
        session.tools = tools
    ignored = loaded.checkpoint.generation.ignored
    show_notes(f"{key} of generation_config.json is not supported" for key in ignored)
    show_notes(loaded.notes)
    if not session.is_chat:
        screen.print("This model has no chat template: it continues your text.")
    return session


@contextmanager
def cached(session: ChatSession, path: Path | None) -> Iterator[None]:
    """Begin with what the model had read when ``path`` was written; write it again at the end.

    Raises:
        WeightError: the file is of another model, or none at all.
        BackendError: the backend cannot export what it has read.
    """
    if path is not None and path.exists():
        with console().status("loading the prompt cache"):
            session.load_cache(path)
    yield
    if path is not None and session.last is not None:
        session.save_cache(path)


def _schema(extras: Extras) -> str | None:
    if extras.schema is not None and extras.regex is not None:
        raise ConfigError("--schema and --regex contradict each other; give one of them")
    if extras.tools is not None and (extras.schema or extras.regex) is not None:
        raise ConfigError(
            "--tools cannot go with --schema or --regex: calls have a form of their own"
        )
    if extras.schema is None:
        return None
    try:
        return extras.schema.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{extras.schema} is not UTF-8 text") from None


def _grammar(
    loaded: LoadedModel, schema: str | None, regex: str | None
) -> Callable[[], Constraint] | None:
    """What makes the constraint of every answer; tried once, so that errors come at once."""
    if schema is None and regex is None:
        return None
    from qwen2kit.engine.constraint import ConstraintCompiler

    stop = loaded.sampling().stop_token_ids
    compiler = ConstraintCompiler(loaded.tokenizer, loaded.checkpoint.spec.vocab_size, stop)

    def constraint() -> Constraint:
        if schema is not None:
            return compiler.json_schema(schema)
        return compiler.regex(str(regex))

    constraint()
    return constraint
