"""Predicted seconds of communication among processes, as far as computation does not hide it.

FSDP's gathers and reductions mostly hide behind a layer's computation as far as that lasts; tensor
and context parallel communication does not. Volumes: arXiv 1910.02054 (FSDP), 2205.05198 (tensor
and sequence parallel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qwen2kit.plan.hardware import Hardware
from qwen2kit.plan.stages import Stage
from qwen2kit.plan.workload import MASTER_BYTES, Workload, share

LINK_EFFICIENCY: Final = 0.75
"""Share of link and network bandwidth that large NCCL collectives reach."""

INTERFERENCE: Final = 0.3
"""Share of hidden communication that computation loses to it, in multiprocessors and memory
bandwidth (fitted to torchtitan's published figures for 8B parameters on A100 and H200)."""

HOP_SECONDS: Final = 4e-6
"""Latency of one step of a ring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal accelerators in equal nodes.

    Attributes:
        hardware: each of them.
        gpus: how many.
        gpus_per_node: how many share a node's links.
    """

    hardware: Hardware
    gpus: int
    gpus_per_node: int = 8

    def bandwidth(self, size: int, stride: int) -> float:
        """Bytes per second that each of ``size`` processes exchanges when all take part, ranks
        being ``stride`` apart. Several members in a node share its network cards."""
        link = self.hardware.link_bandwidth
        if size * stride > self.gpus_per_node:
            in_node = max(1, self.gpus_per_node // stride)
            link = min(link, in_node * self.hardware.network_bandwidth)
        return LINK_EFFICIENCY * link


def layer_communication(
    workload: Workload, stage: Stage, cluster: Cluster, forward: float, backward: float
) -> float:
    """Seconds of one layer's communication for one micro-batch that nothing hides."""
    exposed = _tensor_communication(workload, cluster) + _context(workload, cluster)
    if stage.count > 1:
        return exposed  # a pipeline gathers and reduces once per step
    held = share(workload, stage)
    gather, reduce = _fsdp(workload, cluster, held.layer, held.layer_trainable)
    return exposed + _exposed(gather, forward) + _exposed(gather + reduce, backward)


def _fsdp(
    workload: Workload, cluster: Cluster, elements: int, trainable: int
) -> tuple[float, float]:
    """Seconds to gather weights and to reduce gradients, over replicas as well."""
    degrees = workload.degrees
    gradients = MASTER_BYTES * trainable
    gather = _collective(cluster, workload.width * elements, degrees.sharded, degrees.tp)
    reduce = _collective(cluster, gradients, degrees.sharded, degrees.tp)
    replicas = _collective(
        cluster,
        gradients / degrees.sharded,
        degrees.dp_replicate,
        degrees.tp * degrees.sharded,
    )
    return gather, reduce + 2 * replicas


def _exposed(communication: float, computation: float) -> float:
    """Seconds that communication adds to the computation that it runs beside."""
    hidden = min(communication, computation)
    return communication - hidden + INTERFERENCE * hidden


def _tensor_communication(workload: Workload, cluster: Cluster) -> float:
    """Gather and scatter around attention and MLP, forward and backward (and once more)."""
    size = workload.width * workload.tokens * workload.spec.hidden_size
    passes = 3 if workload.plan.recompute == "full" else 2
    return 4 * passes * _collective(cluster, size, workload.degrees.tp, 1)


def _context(workload: Workload, cluster: Cluster) -> float:
    """Keys and values of the whole row are gathered; their gradients scattered."""
    spec, degrees = workload.spec, workload.degrees
    row = 2 * spec.num_key_value_heads * spec.head_dim / degrees.tp * workload.tokens * degrees.cp
    passes = 3 if workload.plan.recompute == "full" else 2
    return passes * _collective(cluster, workload.width * row, degrees.cp, degrees.tp)


def once_per_step(workload: Workload, stage: Stage, cluster: Cluster) -> float:
    """Weights outside the layers; in a pipeline all weights, and the hidden states handed on."""
    degrees, held = workload.degrees, share(workload, stage)
    layers = held.layers if stage.count > 1 else 0
    fsdp = sum(
        _fsdp(
            workload,
            cluster,
            held.root + layers * held.layer,
            held.root_trainable + layers * held.layer_trainable,
        )
    )
    if stage.count == 1:
        return fsdp
    hidden = workload.width * workload.tokens * workload.spec.hidden_size / degrees.tp
    hop = hidden / cluster.bandwidth(2, degrees.world // degrees.pp)
    return fsdp + 2 * hop * (workload.micro_batches + stage.count - 1)


def _collective(cluster: Cluster, size: float, processes: int, stride: int) -> float:
    """Seconds to gather (or reduce and scatter) ``size`` bytes over a ring of processes."""
    if processes == 1:
        return 0.0
    moved = size * (processes - 1) / processes
    return moved / cluster.bandwidth(processes, stride) + HOP_SECONDS * (processes - 1)
