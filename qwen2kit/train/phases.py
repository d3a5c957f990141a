"""The phases of a run: one, or two if the recipe ends on longer rows.

A phase is a recipe of its own, derived from that of the run, plus the steps it covers. Between
phases the run saves, compiles the model anew and restores it, exactly as a resumed run would.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen2kit.config.tree import LongConfig, RunConfig
from qwen2kit.errors import ConfigError
from qwen2kit.plan.degrees import check_degrees
from qwen2kit.spec.counts import train_flops_per_token
from qwen2kit.spec.model import ModelSpec
from qwen2kit.train.setup import apply_overrides, degrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Steps that share a model, a row length and data.

    Attributes:
        number: 0 or 1.
        last: step it ends after; None is the end of the run.
        config: the recipe that applies.
        spec: the model that is trained.
    """

    number: int
    last: int | None
    config: RunConfig
    spec: ModelSpec

    @property
    def flops_per_token(self) -> int:
        """Model FLOPs per token, as MFU counts them."""
        frozen = self.config.adapter is not None
        return train_flops_per_token(self.spec, self.config.seq_len, frozen=frozen)


def phases(config: RunConfig, spec: ModelSpec, world: int) -> tuple[Phase, ...]:
    """The phases of ``config`` on ``world`` processes, checked.

    Raises:
        ConfigError: a phase does not fit the model or the processes.
    """
    if config.long is None:
        found: tuple[Phase, ...] = (Phase(number=0, last=None, config=config, spec=spec),)
    else:
        found = _two(config, config.long, spec)
    for phase in found:
        _check(phase, world)
    return found


def following(found: tuple[Phase, ...], step: int) -> Phase:
    """The phase of the step after ``step``."""
    return next(phase for phase in found if phase.last is None or step < phase.last)


def _two(config: RunConfig, long: LongConfig, spec: ModelSpec) -> tuple[Phase, ...]:
    assert config.train.steps is not None
    last = config.train.steps - max(1, round(long.fraction * config.train.steps))
    if last < 1:
        raise ConfigError("long.fraction leaves no step before the long phase; lower it")
    changed = _long_config(config, long, spec)
    return (
        Phase(number=0, last=last, config=config, spec=spec),
        Phase(number=1, last=None, config=changed, spec=apply_overrides(spec, changed.model)),
    )


def _long_config(config: RunConfig, long: LongConfig, spec: ModelSpec) -> RunConfig:
    train = config.train
    rows = long.batch_rows or max(1, train.batch_rows * config.seq_len // long.seq_len)
    micro = long.micro_batch_rows or max(1, train.micro_batch_rows * config.seq_len // long.seq_len)
    context = long.max_position_embeddings or max(spec.max_position_embeddings, long.seq_len)
    try:
        return replace(
            config,
            long=None,
            seq_len=long.seq_len,
            data=long.data or config.data,
            parallel=long.parallel or config.parallel,
            model=replace(
                config.model, rope_theta=long.rope_theta, max_position_embeddings=context
            ),
            train=replace(
                train,
                batch_rows=rows,
                micro_batch_rows=micro,
                recompute=long.recompute or train.recompute,
            ),
        )
    except ConfigError as error:
        raise ConfigError(f"long: {error}") from None


def _check(phase: Phase, world: int) -> None:
    config, where = phase.config, "long: " if phase.number else ""
    if config.seq_len > phase.spec.max_position_embeddings:
        raise ConfigError(
            f"{where}seq_len={config.seq_len} exceeds the model's max_position_embeddings="
            f"{phase.spec.max_position_embeddings}; lower seq_len or raise "
            "model.max_position_embeddings"
        )
    try:
        check_degrees(
            phase.spec,
            degrees(config, world),
            seq_len=config.seq_len,
            batch_rows=config.train.batch_rows,
            micro_batch_rows=config.train.micro_batch_rows,
        )
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
