"""Generation defaults of a checkpoint: every id that ends a text, and its sampling settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.errors import ConfigError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.weights.hf_layout import read_json

if TYPE_CHECKING:
    from qwen2kit.tokenizer.bpe import Tokenizer

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
_HF_TOP_K = 50  # transformers' value for sampling without top_k

# Settings that change which token is drawn and that the sampler here does not implement, with
# the value that means "off".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "min_p": (0, 0.0), "typical_p": (1, 1.0), "epsilon_cutoff": (0, 0.0), "eta_cutoff": (0, 0.0),
    "no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1, 1.0), "num_beams": (1,),
    "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "sequence_bias": (), "top_h": (),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """How the checkpoint's authors meant it to be sampled.

    Attributes:
        stop_token_ids: generation ends with any of these.
        temperature: 0 is greedy.
        top_p, top_k, repetition_penalty: as in `Sampling`; 1, 0 and 1 are off.
        ignored: keys of generation_config.json that would change the output and are not
            implemented, for display.
    """

    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    ignored: tuple[str, ...] = ()

    def to_hf(self, spec: ModelSpec) -> dict[str, Any]:
        """A ``generation_config.json`` document with the full list of end ids."""
        document: dict[str, Any] = {
            "bos_token_id": spec.bos_token_id,
            "pad_token_id": spec.pad_token_id,
            "eos_token_id": list(self.stop_token_ids),
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature > 0:
            document |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return document


def read_generation(
    directory: Path, spec: ModelSpec, tokenizer: Callable[[], Tokenizer]
) -> GenerationDefaults:
    """Defaults of a model directory, from generation_config.json, config.json and tokenizer files.

    A model with a chat template stops on both ``<|im_end|>`` and ``<|endoftext|>``, whatever its
    configs list: some name only one. Ids outside the vocabulary are dropped. Without
    generation_config.json (or with ``do_sample`` false) decoding is greedy; sampling without
    ``top_k`` means 50, as in transformers. ``tokenizer`` is called only for a chat model.

    Raises:
        ConfigError: a value has the wrong type or range; the message names the file and key.
    """
    path = directory / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    listed = [*_ids(path, config.get("eos_token_id")), *_spec_ids(spec)]
    if has_chat_template(directory):
        listed += _end_ids(tokenizer())
    sampling = config.get("do_sample") is True
    repetition = _number(path, config, "repetition_penalty", 1.0, low=0.0, open_low=True)
    return GenerationDefaults(
        stop_token_ids=stop_ids(spec, listed),
        temperature=_number(path, config, "temperature", 1.0) if sampling else 0.0,
        top_p=_number(path, config, "top_p", 1.0, high=1.0, open_low=True) if sampling else 1.0,
        top_k=int(_number(path, config, "top_k", _HF_TOP_K)) if sampling else 0,
        repetition_penalty=repetition,
        ignored=tuple(
            key
            for key, off in _UNSUPPORTED.items()
            if config.get(key) is not None and config[key] not in off
        ),
    )


def stop_ids(spec: ModelSpec, ids: Iterable[int]) -> tuple[int, ...]:
    """``ids`` without repetitions and without ids that the vocabulary does not have."""
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < spec.vocab_size))


def has_chat_template(directory: Path) -> bool:
    """Whether the directory carries a chat template in any of the three places it may be."""
    if any((directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = directory / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


def _spec_ids(spec: ModelSpec) -> list[int]:
    eos = spec.eos_token_id
    return list(eos) if isinstance(eos, tuple) else [] if eos is None else [eos]


def _end_ids(tokenizer: Tokenizer) -> list[int]:
    ids = [tokenizer.token_to_id(token) for token in END_TOKENS]
    return [number for number in ids if number is not None]


def _ids(path: Path, value: object) -> list[int]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    ids = [item for item in items if type(item) is int]
    if len(ids) != len(items):
        raise ConfigError(f"{path}: eos_token_id must be an integer or a list, got {value!r}")
    return ids


def _number(
    path: Path,
    config: Mapping[str, Any],
    key: str,
    default: float,
    *,
    low: float = 0.0,
    high: float = float("inf"),
    open_low: bool = False,
) -> float:
    value = config.get(key)
    if value is None:
        return default
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not low <= value <= high or (open_low and value == low):
        raise ConfigError(f"{path}: {key} has the invalid value {value!r}")
    return float(value)
