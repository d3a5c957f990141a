"""PEFT's ``adapter_config.json`` for LoRA, strict: what would change the result is understood or
refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, TypeVar

from qwen2kit.adapters.lora import Adapter, finite_number, lora_scale
from qwen2kit.errors import ConfigError
from qwen2kit.weights.hf_layout import read_json

T = TypeVar("T")

# Settings understood at these values only, and what another value would mean.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), "only LoRA adapters are read"),
    "task_type": (("CAUSAL_LM", None), "only causal language models are read"),
    "use_dora": ((False, None), "DoRA is not supported"),
    "bias": (("none", None), "trained biases are not supported"),
    "lora_bias": ((False, None), "adapters with biases are not supported"),
    "fan_in_fan_out": ((False, None), "transposed weights do not occur in this model family"),
    "modules_to_save": ((None, []), "fully trained modules beside the adapter are not supported"),
    "init_lora_weights": (
        (True, False, None, "gaussian", "orthogonal", "eva"),
        "this initialisation changes the base weights; save the adapter as a plain LoRA",
    ),
}  # fmt: skip

_READ = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "base_model_name_or_path",
}  # fmt: skip

# Bookkeeping, and settings of how to train or where to put modules: the stored tensors tell.
_INERT = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What the config says of the tensors beside it.

    Attributes:
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: values by regular expression over module paths.
        rslora: rank-stabilised scale.
        targets: the adapted modules: path endings, or one regular expression.
        dropout: while training.
        base_model: where it was trained from.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    targets: tuple[str, ...] | str
    dropout: float
    base_model: str | None

    def rank_of(self, module: str) -> int:
        """r of a module path."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Scale of a module path."""
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return lora_scale(self.rank_of(module), alpha, rslora=self.rslora)

    def targeted(self, module: str) -> bool:
        """Whether the config says that ``module`` is adapted (exclusions aside)."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(module == t or module.endswith(f".{t}") for t in self.targets)


def read_peft_config(path: Path) -> PeftConfig:
    """Read and check ``path``.

    Raises:
        ConfigError: not a LoRA config, a setting that is not supported, or a value of the wrong
            type; the message names it.
    """
    config = read_json(path)
    for key, (allowed, meaning) in _FIXED.items():
        if key in config and config[key] not in allowed:
            raise ConfigError(f"{path}: {key} is {config[key]!r}: {meaning}")
    if "peft_type" not in config:
        raise ConfigError(f"{path}: has no peft_type; this is not a PEFT adapter")
    known = _FIXED.keys() | _READ | _INERT
    strange = [key for key, value in config.items() if key not in known and value]
    if strange:
        raise ConfigError(f"{path}: {strange[0]} is set, which is not supported")
    reader = _Reader(path, config)
    base = config.get("base_model_name_or_path")
    return PeftConfig(
        rank=reader.rank("r", config.get("r")),
        alpha=finite_number(path, "lora_alpha", config.get("lora_alpha")),
        rank_pattern={
            k: reader.rank(f"rank_pattern.{k}", v) for k, v in reader.pattern("rank_pattern")
        },
        alpha_pattern={
            k: finite_number(path, f"alpha_pattern.{k}", v)
            for k, v in reader.pattern("alpha_pattern")
        },
        rslora=bool(config.get("use_rslora")),
        targets=reader.targets(),
        dropout=finite_number(path, "lora_dropout", config.get("lora_dropout", 0.0)),
        base_model=base if isinstance(base, str) and base else None,
    )


def peft_document(adapter: Adapter) -> dict[str, Any]:
    """An ``adapter_config.json`` from which PEFT builds exactly the modules of ``adapter``."""
    updates = adapter.modules
    rank = adapter.rank
    alphas = {m: _alpha(u.scale, u.rank, adapter.rslora) for m, u in updates.items()}
    usual = max(alphas.values(), key=[*alphas.values()].count)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": usual,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "target_modules": target_modules(updates),
        "rank_pattern": {re.escape(m): u.rank for m, u in updates.items() if u.rank != rank},
        "alpha_pattern": {re.escape(m): a for m, a in alphas.items() if a != usual},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "inference_mode": True,
    }


def target_modules(modules: Iterable[str]) -> list[str]:
    """Last names where the same ones are adapted in every layer from 0 on, else full paths."""
    paths = list(modules)
    layers: dict[str, set[str]] = {}
    for path in paths:
        head, _, rest = path.partition(".layers.")
        number, _, inner = rest.partition(".")
        layers.setdefault(f"{head}.{number}", set()).add(inner)
    numbers = sorted(int(key.rpartition(".")[2]) for key in layers)
    regular = len(set(map(frozenset, layers.values()))) == 1
    if not regular or numbers != list(range(len(numbers))):
        return paths
    return sorted({path.rpartition(".")[2] for path in paths})


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    alpha = round(scale * (sqrt(rank) if rslora else rank), 9)
    return int(alpha) if alpha == int(alpha) else alpha


def _by_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


class _Reader:
    """Typed values of one config, with errors that name the file."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, config

    def rank(self, key: str, value: object) -> int:
        if type(value) is not int or value < 1:
            raise ConfigError(f"{self.path}: {key} must be a positive integer, got {value!r}")
        return value

    def pattern(self, key: str) -> list[tuple[str, object]]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise ConfigError(f"{self.path}: {key} must be an object, got {value!r}")
        for pattern in value:
            self._compile(key, pattern)
        return list(value.items())

    def targets(self) -> tuple[str, ...] | str:
        value = self.config.get("target_modules")
        if isinstance(value, str):
            self._compile("target_modules", value)
            return value
        if not isinstance(value, list) or not value or any(not isinstance(t, str) for t in value):
            raise ConfigError(f"{self.path}: target_modules must name modules, got {value!r}")
        return tuple(value)

    def _compile(self, key: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{self.path}: {key} holds a bad pattern {pattern!r}") from error
