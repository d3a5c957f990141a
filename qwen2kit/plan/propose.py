"""The meshes that a number of accelerators allows, those that fit in memory, the fastest first.

Every division of the processes over the mesh axes is tried that `check_degrees` accepts, with
every micro-batch size and kind of recomputation. Tensor parallelism stays within a node and
replicas consist of whole nodes, since anything else is slower at equal memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, get_args

from qwen2kit.backend.plan import Recompute
from qwen2kit.errors import ConfigError
from qwen2kit.plan import memory, time
from qwen2kit.plan.communication import Cluster
from qwen2kit.plan.degrees import Degrees, check_degrees
from qwen2kit.plan.memory import Memory
from qwen2kit.plan.time import StepTime
from qwen2kit.plan.workload import Workload

HEADROOM: Final = 0.95
"""Share of the device's memory that a proposal may need."""

SIMPLICITY: Final = 0.01
"""What a mesh axis, or filling the memory instead of leaving it empty, must gain in time."""

SHORTEST_PIECE: Final = 4096
"""Tokens of a row that context parallelism leaves each process at least; shorter products and
attention are slower than this model of time knows."""

SHOWN: Final = 5

LARGEST_CLUSTER: Final = 8192
"""Accelerators up to which `smallest_cluster` looks."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A way to compute the step, and what it costs.

    Attributes:
        workload: with degrees, micro-batch size and recomputation settled.
        cluster: what it runs on.
    """

    workload: Workload
    cluster: Cluster

    @cached_property
    def memory(self) -> tuple[Memory, ...]:
        """Of the processes of every pipeline stage."""
        return memory.predict(self.workload)

    @cached_property
    def time(self) -> StepTime:
        """Seconds of the step on the slowest stage."""
        return time.predict(self.workload, self.cluster)

    @cached_property
    def needs(self) -> int:
        """Bytes that each device must have."""
        ends = (memory.stage_memory(self.workload, stage) for stage in self.workload.ends)
        return max(end.on_device(self.cluster.gpus) for end in ends)

    @property
    def fits(self) -> bool:
        """Whether it has them, with head-room."""
        return self.needs <= HEADROOM * self.cluster.hardware.memory_bytes


def propose(workload: Workload, cluster: Cluster) -> tuple[Prediction, ...]:
    """The `SHOWN` fastest predictions that fit, best first, at most one per mesh.

    Degrees, micro-batch size and recomputation of ``workload`` are ignored. Empty if nothing
    fits.
    """
    best = [
        min(fitting, key=_cost)
        for degrees in meshes(workload, cluster)
        if (fitting := list(_fitting(workload, cluster, degrees)))
    ]
    return tuple(sorted(best, key=_cost)[:SHOWN])


def meshes(workload: Workload, cluster: Cluster) -> Iterator[Degrees]:
    """Valid divisions of the cluster's processes over the mesh axes."""
    alone = workload.plan.adapter is not None  # adapters train with data and context parallelism
    node = min(cluster.gpus_per_node, cluster.gpus)
    for tp in [1] if alone else _divisors(node):
        for pp in [1] if alone else _divisors(cluster.gpus // tp):
            for cp in _divisors(cluster.gpus // (tp * pp)):
                for replicas in _divisors(cluster.gpus // (tp * pp * cp)):
                    shard = cluster.gpus // (tp * pp * cp * replicas)
                    degrees = Degrees(pp=pp, dp_replicate=replicas, dp_shard=shard, cp=cp, tp=tp)
                    if _sensible(workload, cluster, degrees) and _valid(workload, degrees):
                        yield degrees


def least_memory(workload: Workload, cluster: Cluster) -> Prediction | None:
    """The choice that needs least memory, or None if there is no valid mesh."""
    predictions = (
        Prediction(workload=_settled(workload, degrees, 1, "full"), cluster=cluster)
        for degrees in meshes(workload, cluster)
    )
    return min(predictions, key=lambda prediction: prediction.needs, default=None)


def smallest_cluster(workload: Workload, cluster: Cluster) -> int | None:
    """How many accelerators are enough, doubling their number (in whole nodes, where there are
    several); None if none are."""
    gpus, node = cluster.gpus, cluster.gpus_per_node
    while gpus <= LARGEST_CLUSTER:
        least = least_memory(workload, replace(cluster, gpus=gpus))
        if least is not None and least.fits:
            return gpus
        gpus *= 2
        if gpus > node:
            gpus = node * -(-gpus // node)
    return None


def reasons(prediction: Prediction) -> tuple[str, ...]:
    """Why the prediction looks as it does, in a few words each."""
    workload, step = prediction.workload, prediction.time
    degrees, link = workload.degrees, prediction.cluster.hardware.link_gbs
    found = []
    if degrees.tp > 1:
        found.append(f"tp={degrees.tp} within a node ({link:g} GB/s links)")
    if workload.fsdp:
        found.append(f"weights and optimizer divided over {degrees.sharded} processes")
    if degrees.dp_replicate > 1:
        found.append(f"{degrees.dp_replicate} replicas exchange gradients only")
    if degrees.cp > 1:
        found.append(f"each process holds {workload.seq_len // degrees.cp:,} tokens of a row")
    if degrees.pp > 1:
        found.append(f"pipeline bubble {step.bubble / step.total:.0%}")
    if workload.plan.recompute != "none":
        found.append(f"recomputing costs {step.recompute / step.total:.0%}")
    if step.communication > 0.01 * step.total:
        found.append(f"exposed communication {step.communication / step.total:.0%}")
    if step.launch > 0.05 * step.total:
        found.append(f"waits for the host {step.launch / step.total:.0%}; larger micro-batches")
    return tuple(found)


def _fitting(workload: Workload, cluster: Cluster, degrees: Degrees) -> Iterator[Prediction]:
    for recompute in get_args(Recompute):
        for rows in _powers(workload.batch_rows // degrees.data):
            if workload.batch_rows // degrees.data // rows < degrees.pp:
                break  # a pipeline needs a micro-batch for every stage
            choice = _settled(workload, degrees, rows, recompute)
            prediction = Prediction(workload=choice, cluster=cluster)
            if not prediction.fits:
                break  # larger micro-batches need more
            yield prediction


def _settled(workload: Workload, degrees: Degrees, rows: int, recompute: Recompute) -> Workload:
    plan = replace(workload.plan, parallel=degrees, micro_batch_rows=rows, recompute=recompute)
    return replace(workload, plan=plan)


def _cost(prediction: Prediction) -> float:
    degrees = prediction.workload.degrees
    axes = sum(size > 1 for size in degrees.sizes)
    filled = prediction.needs / prediction.cluster.hardware.memory_bytes
    return prediction.time.total * (1 + SIMPLICITY * (axes + filled))


def _sensible(workload: Workload, cluster: Cluster, degrees: Degrees) -> bool:
    replica = degrees.sharded * degrees.tp
    whole_nodes = replica % min(cluster.gpus_per_node, cluster.gpus) == 0
    pieces = degrees.cp == 1 or workload.seq_len // degrees.cp >= SHORTEST_PIECE
    return pieces and (degrees.dp_replicate == 1 or whole_nodes)


def _valid(workload: Workload, degrees: Degrees) -> bool:
    try:
        check_degrees(
            workload.spec,
            degrees,
            seq_len=workload.seq_len,
            batch_rows=workload.batch_rows,
            micro_batch_rows=1,
        )
    except ConfigError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _powers(rows: int) -> list[int]:
    """Powers of two that divide ``rows``."""
    sizes = [1]
    while rows % (2 * sizes[-1]) == 0:
        sizes.append(2 * sizes[-1])
    return sizes
