"""Many prompts to one model, each answer logged as soon as it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.errors import ConfigError
from qwen2kit_evals.generation import Asked, continue_all, decoding, together_by_default
from qwen2kit_evals.request_log import RequestLog


def answer(
    loaded: LoadedModel,
    prompts: Sequence[str],
    gen_kwargs: Mapping[str, Any],
    *,
    log: RequestLog,
    batch_size: int | None = None,
    seed: int = 0,
    label: str = "Generating",
) -> list[str]:
    """Continue each prompt; equal prompts are answered one by one (they differ when sampling).

    Args:
        prompts: texts; special tokens written out count as such.
        gen_kwargs: lm-eval's: ``until``, ``max_gen_toks``, ``do_sample``, ``temperature``, ...
        log: known answers, and where new ones go.
        batch_size: prompts generated together; None is what keeps the device busy.

    Raises:
        ConfigError: a prompt and its answer do not fit the model's context.
        BackendError: the model cannot continue a prompt.
    """
    ids = loaded.tokenizer.encode_many(prompts)
    _check_room(loaded, ids, int(gen_kwargs["max_gen_toks"]))
    keys = log.text_keys(([prompt] for prompt in prompts), [dict(gen_kwargs), seed])
    answers, open_ = log.look_up(keys)
    how = decoding(loaded, gen_kwargs, default_max_tokens=1, seed=seed)
    asked = [Asked(tuple(ids[index]), how, stream=index) for index in open_]
    together = batch_size or together_by_default(loaded)
    with tqdm(total=len(prompts), initial=len(prompts) - len(open_), desc=label) as bar:
        for place, text in continue_all(loaded, asked, together=together):
            index = open_[place]
            answers[index] = text
            log.add(keys[index], text)
            bar.update()
    return answers


def _check_room(loaded: LoadedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    longest = max((len(prompt) for prompt in prompts), default=0)
    limit = loaded.model.spec.context_length
    if longest + new_tokens > limit:
        raise ConfigError(
            f"a prompt of {longest} tokens and {new_tokens} new ones exceed the model's context of "
            f"{limit} tokens; use shorter prompts or fewer --max-tokens"
        )
