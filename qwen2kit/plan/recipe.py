"""From a recipe (or the name of a preset) to what is to be predicted; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from qwen2kit.config.load import find_recipe, load_recipe, shipped
from qwen2kit.config.tree import ModelConfig, ParallelConfig, RunConfig
from qwen2kit.errors import ConfigError
from qwen2kit.plan.degrees import Degrees
from qwen2kit.plan.workload import Workload
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.presets import PRESETS, preset

PRESET_RECIPE: Final = "pretrain"
PRESET_BATCH_ROWS: Final = 1024
"""Rows per step for a bare preset: with the recipe's 4,096 tokens, the 4 M tokens that are usual
for large models (Llama 2, arXiv 2307.09288, section 2.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the run with one row length.

    Attributes:
        name: ``training``, or ``long`` for a concluding phase on longer rows.
        workload: its step, with the recipe's micro-batch size and recomputation.
        steps: how many, or None where the recipe counts epochs.
        degrees: those that the recipe sets, or None if it leaves them open.
    """

    name: str
    workload: Workload
    steps: int | None
    degrees: Degrees | None


def read(recipe: str, overrides: Sequence[str]) -> RunConfig:
    """A recipe as `load_recipe` reads it; a preset's name stands for the ``pretrain`` recipe with
    that model and `PRESET_BATCH_ROWS`.

    Raises:
        ConfigError: neither a file, a shipped recipe nor a preset, or something in it is wrong.
    """
    if recipe.lower() in PRESETS and recipe not in shipped() and not Path(recipe).exists():
        own = [f"model.preset={recipe.lower()}", f"train.batch_rows={PRESET_BATCH_ROWS}"]
        return load_recipe(PRESET_RECIPE, [*own, *overrides])
    try:
        find_recipe(recipe)
    except ConfigError as error:
        raise ConfigError(f"{error}, or a preset: {', '.join(PRESETS)}") from None
    return load_recipe(recipe, overrides)


def spec_of(model: ModelConfig) -> ModelSpec:
    """The spec of a recipe's model.

    Of a checkpoint no more than ``config.json`` must be on this disk; the published Qwen2 and
    Qwen2.5 models are presets anyway.

    Raises:
        ConfigError: its checkpoint is not here.
        Qwen2KitError: the checkpoint cannot be read, or a field that the recipe sets is impossible.
    """
    from qwen2kit.train.setup import apply_overrides

    if model.preset is not None:
        return apply_overrides(preset(model.preset), model)
    assert model.checkpoint is not None
    return apply_overrides(_local_spec(model.checkpoint), model)


def phases_of(config: RunConfig, spec: ModelSpec) -> tuple[Phase, ...]:
    """The phases of ``config``.

    Raises:
        ConfigError: a phase does not fit the model.
    """
    from qwen2kit.train import phases

    long = config.long
    open_long = None if long is None else replace(long, parallel=None)
    open_config = replace(config, parallel=ParallelConfig(), long=open_long)
    found = phases.phases(open_config, spec, 1)
    meshes = [config.parallel, (long and long.parallel) or config.parallel]
    ends = [phase.last or config.train.steps for phase in found]
    starts = [0, *ends]
    return tuple(
        Phase(
            name="long" if phase.number else "training",
            workload=_workload(phase.config, phase.spec),
            steps=None if end is None else end - (starts[phase.number] or 0),
            degrees=_explicit(meshes[phase.number]),
        )
        for phase, end in zip(found, ends, strict=True)
    )


def _workload(config: RunConfig, spec: ModelSpec) -> Workload:
    from qwen2kit.train.setup import execution_plan

    plan = execution_plan(config)
    assert plan.train is not None
    return Workload(
        spec=spec,
        plan=plan.train,
        seq_len=config.seq_len,
        batch_rows=config.train.batch_rows,
        dtype="float32" if plan.dtype == "float32" else "bfloat16",
    )


def _explicit(mesh: ParallelConfig) -> Degrees | None:
    if mesh == ParallelConfig():
        return None
    return Degrees(
        pp=mesh.pp,
        dp_replicate=mesh.dp_replicate,
        dp_shard=mesh.dp_shard,
        cp=mesh.cp,
        tp=mesh.tp,
        schedule=mesh.schedule,
    )


def _local_spec(checkpoint: str) -> ModelSpec:
    from qwen2kit.spec.hf import from_hf_config
    from qwen2kit.weights.checkpoint import open_checkpoint
    from qwen2kit.weights.hf_layout import read_json
    from qwen2kit.weights.locate import locate

    path = Path(checkpoint).expanduser()
    config = path / "config.json" if path.exists() else _cached_config(checkpoint)
    if config is None:
        published = _published(checkpoint)
        if published is not None:
            return published
        raise ConfigError(
            f"model.checkpoint {checkpoint} is not on this disk; download its config.json and give "
            "the directory, or plan for a preset of its size, e.g. model.preset=qwen2-7b "
            "model.tokenizer=train"
        )
    if config.is_file():
        return from_hf_config(read_json(config))
    found = locate(checkpoint)
    if found.is_dir():
        return from_hf_config(read_json(found / "config.json"))
    return open_checkpoint(found).spec


def _published(model: str) -> ModelSpec | None:
    """The preset behind the hub id of a published model, e.g. ``Qwen/Qwen2-7B-Instruct``."""
    organisation, _, name = model.lower().rpartition("/")
    size = name.removesuffix("-instruct")
    return preset(size) if organisation == "qwen" and size in PRESETS else None


def _cached_config(model: str) -> Path | None:
    """``config.json`` of a hub id from the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
