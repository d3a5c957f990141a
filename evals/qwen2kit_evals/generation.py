"""Text generation as lm-eval asks for it: its keyword arguments in, cut text out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.engine.text import TextEngine
from qwen2kit.errors import ConfigError, NonFiniteLogits
from qwen2kit.generate.sampling import Sampling
from qwen2kit_evals.provenance import device_name

_TOGETHER, _TOGETHER_ON_CPU = 256, 16
# Nobody waits for the first token: prompts are read in pieces that keep a GPU busy.
_PREFILL_TOKENS = 8192
_KNOWN = {
    "until",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "max_gen_toks",
    "num_beams",
}


@dataclass(frozen=True, slots=True)
class Decoding:
    """One way to continue prompts.

    Attributes:
        sampling: token choice, length limit and stop ids.
        stop: strings; text ends before the first of them.
    """

    sampling: Sampling
    stop: tuple[str, ...]


def decoding(
    loaded: LoadedModel, gen_kwargs: Mapping[str, Any], *, default_max_tokens: int, seed: int
) -> Decoding:
    """What a task's ``generation_kwargs`` mean for this model.

    As with lm-eval's ``hf`` model, sampling needs ``do_sample`` or a temperature above 0, and what
    the task leaves open (``top_p``, ``top_k``, ``repetition_penalty``) comes from the checkpoint's
    generation_config.json; truncation plays no part in greedy decoding. A stop string that is one
    of the tokenizer's special tokens is matched as a token, since decoded text leaves those out.

    Raises:
        ConfigError: a key this package cannot honour, or sampling without a temperature.
    """
    values: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs), default_max_tokens))
    unknown = sorted(set(values) - _KNOWN)
    if unknown:
        raise ConfigError(
            f"generation_kwargs {', '.join(unknown)} not supported; use {', '.join(sorted(_KNOWN))}"
        )
    if values.get("num_beams", 1) != 1:
        raise ConfigError("beam search (num_beams > 1) is not supported; remove num_beams")
    temperature = float(values.get("temperature", 0.0)) if values["do_sample"] else 0.0
    if values["do_sample"] and temperature == 0:
        raise ConfigError("do_sample needs a temperature above 0 in generation_kwargs")
    until = tuple(text for text in values["until"] if text)
    special = {token: _special_id(loaded, token) for token in until}
    options: dict[str, object] = {
        "temperature": temperature,
        "top_p": values.get("top_p") if values["do_sample"] else 1.0,
        "top_k": values.get("top_k") if values["do_sample"] else 0,
        "repetition_penalty": values.get("repetition_penalty"),
        "max_new_tokens": values["max_gen_toks"],
        "seed": seed,
    }
    defaults = loaded.sampling(**options)
    stop_ids = [*defaults.stop_token_ids, *(i for i in special.values() if i is not None)]
    sampling = loaded.sampling(**options, stop_token_ids=tuple(dict.fromkeys(stop_ids)))
    return Decoding(sampling, tuple(text for text in until if special[text] is None))


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt to continue.

    Attributes:
        prompt: token ids.
        how: to continue it.
        stream: tells prompts that share a seed apart; an answer depends on nothing else around.
    """

    prompt: tuple[int, ...]
    how: Decoding
    stream: int


def continue_all(
    loaded: LoadedModel, asked: Sequence[Asked], *, together: int
) -> Iterator[tuple[int, str]]:
    """Continue every prompt; yields (index, text) as each one ends, before its first stop string.

    At most ``together`` prompts run at a time (fewer where memory holds fewer); others take the
    places of those that end. Prompts start in the order of their tokens, so that those with a
    common beginning find it computed.

    Raises:
        BackendError: a prompt is too long, or not even one fits the memory.
        NonFiniteLogits: the model produced no numbers.
    """
    if not asked:
        return
    limit = loaded.model.limit
    capacity = max(min(limit, len(a.prompt) + a.how.sampling.max_new_tokens) for a in asked)
    texts: dict[int, list[str]] = {}
    owners: dict[int, int] = {}
    with TextEngine(
        loaded,
        slots=min(together, len(asked)),
        capacity=capacity,
        prefill_tokens=_PREFILL_TOKENS,
    ) as engine:
        waiting = deque(sorted(range(len(asked)), key=lambda index: asked[index].prompt))
        while waiting or texts:
            for _ in range(_to_start(len(waiting), together - len(texts), together)):
                item = asked[index := waiting.popleft()]
                key = engine.submit(
                    item.prompt, item.how.sampling, stop=item.how.stop, stream=item.stream
                )
                owners[key], texts[key] = index, []
            for event in engine.step():
                if event.finish_reason == "error":
                    raise NonFiniteLogits
                texts[event.key].append(event.text)
                if event.finish_reason is not None:
                    yield owners[event.key], "".join(texts.pop(event.key))


def _to_start(waiting: int, free: int, together: int) -> int:
    """How many prompts to start now: none until an eighth of the places is free.

    A step that reads prompts takes a GPU several times as long as one that only draws, so it is
    better to read many in few steps than one in each.
    """
    return min(waiting, free) if free >= min(waiting, max(1, together // 8)) else 0


def together_by_default(loaded: LoadedModel) -> int:
    """How many prompts are generated at a time when nobody says: what keeps the device busy."""
    return _TOGETHER_ON_CPU if device_name(loaded).startswith("cpu") else _TOGETHER


def _special_id(loaded: LoadedModel, text: str) -> int | None:
    token = loaded.tokenizer.token_to_id(text)
    return token if token is not None and token in loaded.tokenizer.special_ids else None
