"""The options ``--draft`` and ``--prompt-lookup``, which several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit.engine.drafting import Drafter

DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="A smaller model of the same tokenizer that guesses ahead: the same text, sooner.",
    ),
]
PromptLookupOption = Annotated[
    int | None,
    typer.Option(
        "--prompt-lookup",
        help="Guess up to so many tokens by copying what followed the same words before.",
    ),
]


def check_guessing(draft: str | None, prompt_lookup: int | None) -> None:
    """What can be known before a model is loaded.

    Raises:
        ConfigError: both options, or a number that is not positive.
    """
    if draft is not None and prompt_lookup is not None:
        raise ConfigError("--draft and --prompt-lookup are two ways to guess; give one of them")
    if prompt_lookup is not None and prompt_lookup < 1:
        raise ConfigError(f"prompt lookup must guess at least 1 token, got {prompt_lookup}")


def drafter_maker(
    loaded: LoadedModel, draft: str | None, prompt_lookup: int | None
) -> Callable[[int, int], Drafter] | None:
    """What makes a drafter for an engine of so many slots and so many tokens; None for none.

    Raises:
        ConfigError: both options, a number that is not positive, or another tokenizer.
        Qwen2KitError: the draft model cannot be loaded.
    """
    check_guessing(draft, prompt_lookup)
    if prompt_lookup is not None:
        from qwen2kit.engine.prompt_lookup import PromptLookup

        return lambda slots, capacity: PromptLookup(prompt_lookup)
    return None if draft is None else _draft_model(loaded, draft)


def _draft_model(loaded: LoadedModel, draft: str) -> Callable[[int, int], Drafter]:
    from qwen2kit.backend.loading import load_model
    from qwen2kit.engine.draft_model import DraftModel, check_same_tokenizer

    small = load_model(draft, backend=loaded.backend.name, plan=loaded.plan)
    check_same_tokenizer(small.tokenizer, loaded.tokenizer)
    return lambda slots, capacity: DraftModel(
        small.model, loaded.model, slots=slots, capacity=capacity
    )
