"""How many processes work along each mesh axis, and which products of them a model allows.

Mesh axes are named as in the field: ``pp`` pipeline, ``dp_replicate`` replicas of the whole
sharded state (HSDP), ``dp_shard`` fully sharded data parallel, ``cp`` context (the sequence),
``tp`` tensor. Experts will be spread over ``dp_shard`` (times ``cp``): the axis exists already.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Final, Literal

from qwen2kit.errors import ConfigError
from qwen2kit.spec.model import ModelSpec

MESH_AXES: Final = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
Schedule = Literal["gpipe", "1f1b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """Processes per mesh axis; their product is the world size.

    Attributes:
        pp, dp_replicate, dp_shard, cp, tp: see the module. ``dp_shard=0`` takes what is left.
        schedule: order of micro-batches in a pipeline.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    schedule: Schedule = "1f1b"

    @property
    def world(self) -> int:
        """Number of processes."""
        return prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Degrees in the order of `MESH_AXES`."""
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    @property
    def data(self) -> int:
        """Processes that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def sharded(self) -> int:
        """Processes that share one copy of the optimizer state (per tensor and pipeline rank)."""
        return self.dp_shard * self.cp

    def fill(self, world: int) -> Degrees:
        """``dp_shard=0`` replaced by what ``world`` leaves for it.

        Raises:
            ConfigError: the other degrees do not divide ``world``, or the product is not it.
        """
        others = prod(size for axis, size in zip(MESH_AXES, self.sizes, strict=True) if size)
        if self.dp_shard == 0:
            if world % others:
                raise ConfigError(
                    f"{world} processes cannot be divided by {self.describe()} = {others}; "
                    "choose degrees whose product divides the number of processes"
                )
            return replace(self, dp_shard=world // others)
        if others != world:
            raise ConfigError(
                f"{self.describe()} needs {others} processes, but {world} are running; change "
                "[parallel] or the number of processes"
            )
        return self

    def describe(self) -> str:
        """The degrees other than 1, e.g. ``dp_shard=2 x tp=2``."""
        parts = [
            f"{axis}={size}" for axis, size in zip(MESH_AXES, self.sizes, strict=True) if size > 1
        ]
        return " x ".join(parts) or "one process"


def check_degrees(
    spec: ModelSpec,
    degrees: Degrees,
    *,
    seq_len: int | None = None,
    batch_rows: int | None = None,
    micro_batch_rows: int | None = None,
) -> None:
    """Refuse degrees that ``spec`` cannot be divided by.

    Args:
        seq_len, batch_rows, micro_batch_rows: of the recipe; None leaves their rules out.

    Raises:
        ConfigError: listing every rule that is broken, with the numbers.
    """
    problems = [
        *_tensor_problems(spec, degrees.tp),
        *_pipeline_problems(spec, degrees.pp),
        *_sequence_problems(degrees, seq_len),
        *_batch_problems(degrees, batch_rows, micro_batch_rows),
    ]
    if problems:
        raise ConfigError("; ".join(problems))


def _tensor_problems(spec: ModelSpec, tp: int) -> list[str]:
    sizes = {
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
    }
    return [
        f"tp={tp} does not divide {name}={size}{_largest(size, tp)}"
        for name, size in sizes.items()
        if size % tp
    ]


def _largest(size: int, tp: int) -> str:
    best = max(divisor for divisor in range(1, tp) if size % divisor == 0)
    return f" (the largest smaller tp that does is {best})"


def _pipeline_problems(spec: ModelSpec, pp: int) -> list[str]:
    if pp <= spec.num_hidden_layers:
        return []
    return [f"pp={pp} needs a layer for every stage, but there are {spec.num_hidden_layers}"]


def _sequence_problems(degrees: Degrees, seq_len: int | None) -> list[str]:
    if seq_len is None:
        return []
    problems = []
    if degrees.cp > 1 and seq_len % (2 * degrees.cp):
        problems.append(
            f"cp={degrees.cp} cuts a row into {2 * degrees.cp} equal pieces, which "
            f"seq_len={seq_len} cannot be"
        )
    if degrees.tp > 1 and (seq_len // degrees.cp) % degrees.tp:
        problems.append(
            f"tp={degrees.tp} (sequence parallel) does not divide the {seq_len // degrees.cp} "
            "tokens of a row that one process holds"
        )
    return problems


def _batch_problems(
    degrees: Degrees, batch_rows: int | None, micro_batch_rows: int | None
) -> list[str]:
    if batch_rows is None:
        return []
    if batch_rows % degrees.data:
        return [
            f"batch_rows={batch_rows} is not a multiple of dp_replicate * dp_shard = {degrees.data}"
        ]
    rows = batch_rows // degrees.data
    if micro_batch_rows is not None and rows % micro_batch_rows:
        return [
            f"micro_batch_rows={micro_batch_rows} does not divide the {rows} rows of one data "
            "parallel process"
        ]
    if micro_batch_rows is not None and rows // micro_batch_rows < degrees.pp:
        return [
            f"pp={degrees.pp} needs as many micro-batches per step, but {rows} rows in pieces of "
            f"micro_batch_rows={micro_batch_rows} are {rows // micro_batch_rows}"
        ]
    return []
