"""Many prompts to one model, in batches, each answer logged as soon as it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from tqdm import tqdm  # type: ignore[import-untyped]

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.errors import ConfigError
from qwen2kit_evals.generation import continue_prompts, decoding
from qwen2kit_evals.request_log import RequestLog

SEEDS_PER_RUN = 1_000_003


def answer(
    loaded: LoadedModel,
    prompts: Sequence[str],
    gen_kwargs: Mapping[str, Any],
    *,
    log: RequestLog,
    batch_size: int,
    seed: int = 0,
    label: str = "Generating",
) -> list[str]:
    """Continue each prompt; equal prompts are answered one by one (they differ when sampling).

    Batches hold prompts of like length, longest first. A batch of which some answers are known is
    computed whole, so that an interrupted run gives the same answers.

    Args:
        prompts: texts; special tokens written out count as such.
        gen_kwargs: lm-eval's: ``until``, ``max_gen_toks``, ``do_sample``, ``temperature``, ...
        log: known answers, and where new ones go.

    Raises:
        ConfigError: a prompt and its answer do not fit the model's context.
        BackendError: the model cannot continue a prompt.
    """
    ids = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    _check_room(loaded, ids, int(gen_kwargs["max_gen_toks"]))
    keys = log.text_keys(([prompt] for prompt in prompts), [dict(gen_kwargs), seed])
    answers: list[str | None] = [log.find(key) for key in keys]
    order = sorted(range(len(prompts)), key=lambda index: -len(ids[index]))
    done = len(prompts) - answers.count(None)
    with tqdm(total=len(prompts), initial=done, desc=label) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            if all(answers[index] is not None for index in batch):
                continue
            how = decoding(
                loaded, gen_kwargs, default_max_tokens=1, seed=seed * SEEDS_PER_RUN + start
            )
            texts = continue_prompts(loaded, [ids[index] for index in batch], how)
            for index, text in zip(batch, texts, strict=True):
                if answers[index] is None:
                    answers[index] = text
                    log.add(keys[index], text)
                    bar.update()
    return cast(list[str], answers)


def _check_room(loaded: LoadedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    longest = max((len(prompt) for prompt in prompts), default=0)
    limit = loaded.model.spec.context_length
    if longest + new_tokens > limit:
        raise ConfigError(
            f"a prompt of {longest} tokens and {new_tokens} new ones exceed the model's context of "
            f"{limit} tokens; use shorter prompts or fewer --max-tokens"
        )
