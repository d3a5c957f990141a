"""Options that the commands under ``qwen2kit eval`` share, and loading the model they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2kit.cli.output import show_notes
from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel

BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Prompts generated together; default what suits the device."),
]
Output = Annotated[
    Path | None,
    typer.Option(help="Directory, new or of an interrupted run; default eval-results/..."),
]
ChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="Wrap prompts in the model's chat template.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

_THOUSAND = 1024


def load(model: str, *, backend: str, dtype: str, device: str, adapter: str | None) -> LoadedModel:
    """The model on its backend; raises what `load_model` does, or `MissingExtra`."""
    from importlib.util import find_spec

    from qwen2kit.errors import MissingExtra

    if find_spec("lm_eval") is None:
        raise MissingExtra("eval", "lm-eval")
    from qwen2kit.backend.loading import load_model
    from qwen2kit.backend.plan import ExecutionPlan

    plan = ExecutionPlan(device=device, dtype=dtype)
    loaded = load_model(model, backend=backend, plan=plan, adapter=adapter)
    show_notes(loaded.notes)
    return loaded


def lengths_of(text: str) -> list[int]:
    """Token counts: ``1k,2k,4000`` is 1024, 2048 and 4000.

    Raises:
        ConfigError: something else.
    """
    found = []
    for part in text.split(","):
        digits = part.strip().lower().removesuffix("k")
        if not digits.isdecimal() or not int(digits):
            raise ConfigError(f"--lengths must be token counts like 1k,2k,4000, got {text!r}")
        found.append(int(digits) * (_THOUSAND if part.strip().lower().endswith("k") else 1))
    return found


def numbers_of(text: str, option: str) -> list[float]:
    """``0,25,50``.

    Raises:
        ConfigError: something else; names ``option``.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} must be numbers separated by commas, got {text!r}") from error
