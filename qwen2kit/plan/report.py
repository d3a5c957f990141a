"""What ``qwen2kit plan`` says, as JSON data: model, cluster, and for each phase of the run the
chosen mesh with its memory, time and the lines to paste, its alternatives, and advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from qwen2kit.backend.plan import LoRAPlan
from qwen2kit.config.tree import AdapterConfig
from qwen2kit.errors import ConfigError
from qwen2kit.plan import time
from qwen2kit.plan.communication import Cluster
from qwen2kit.plan.degrees import MESH_AXES, Degrees, check_degrees
from qwen2kit.plan.propose import Prediction, least_memory, propose, reasons, smallest_cluster
from qwen2kit.plan.recipe import Phase
from qwen2kit.plan.workload import Workload, trainable_parameters
from qwen2kit.spec.counts import count_params

SECONDS_PER_DAY: Final = 86_400

_ADAPTER_RECIPES: Final[dict[str, Literal["none", "nf4"]]] = {"lora": "none", "qlora": "nf4"}


def report(
    phases: Sequence[Phase], cluster: Cluster, *, tokens: float | None = None
) -> dict[str, Any]:
    """Predictions for every phase.

    Args:
        phases: of one recipe.
        cluster: what it would run on.
        tokens: of the whole run; None takes the recipe's steps.

    Raises:
        ConfigError: the recipe's degrees are impossible, or it leaves them open and nothing fits.
    """
    shares = _token_shares(phases, tokens)
    planned = [_phase(phase, cluster, share) for phase, share in zip(phases, shares, strict=True)]
    days = [part["plan"]["days"] for part in planned]
    return {
        "parameters": _parameters(phases[0].workload),
        "cluster": _cluster(cluster),
        "phases": planned,
        "days": None if None in days else sum(days),
        "fits": all(part["plan"]["fits"] for part in planned),
    }


def settle(phase: Phase, cluster: Cluster) -> tuple[Prediction, ...]:
    """The prediction of the recipe's own degrees, or the proposals for open ones.

    Raises:
        ConfigError: the degrees are impossible, or nothing fits.
    """
    workload = phase.workload
    _check_float8(workload, cluster)
    if phase.degrees is not None:
        return (_explicit(workload, phase.degrees, cluster),)
    found = propose(workload, cluster)
    if not found:
        raise ConfigError(_nothing_fits(workload, cluster))
    return found


def toml(workload: Workload, phase: str = "training") -> str:
    """The lines of a recipe that choose this way to compute the step of a phase."""
    degrees, plan = workload.degrees, workload.plan
    mesh = [f"{axis} = {size}" for axis, size in zip(MESH_AXES, degrees.sizes, strict=True)]
    if degrees.pp > 1:
        mesh.append(f'schedule = "{degrees.schedule}"')
    step = [f"micro_batch_rows = {plan.micro_batch_rows}", f'recompute = "{plan.recompute}"']
    long = phase == "long"
    step_table, mesh_table = ("long", "long.parallel") if long else ("train", "parallel")
    return "\n".join([f"[{step_table}]", *step, "", f"[{mesh_table}]", *mesh])


def _phase(phase: Phase, cluster: Cluster, tokens: float | None) -> dict[str, Any]:
    predictions = settle(phase, cluster)
    chosen = predictions[0]
    workload = chosen.workload
    alternatives = predictions[1:]
    if phase.degrees is not None and not chosen.fits:
        alternatives = propose(workload, cluster)
    return {
        "name": phase.name,
        "proposed": phase.degrees is None,
        "seq_len": workload.seq_len,
        "batch_rows": workload.batch_rows,
        "tokens_per_step": workload.tokens_per_step,
        "dtype": workload.dtype,
        "flops_per_token": time.flops_per_token(workload),
        "plan": _prediction(chosen, phase, tokens),
        "alternatives": [_prediction(other, phase, tokens) for other in alternatives],
        "notes": _notes(workload),
    }


def _prediction(prediction: Prediction, phase: Phase, tokens: float | None) -> dict[str, Any]:
    workload, step = prediction.workload, prediction.time
    rate = time.tokens_per_second(workload, step.total)
    return {
        "parallel": dict(zip(MESH_AXES, workload.degrees.sizes, strict=True)),
        "schedule": workload.degrees.schedule,
        "micro_batch_rows": workload.plan.micro_batch_rows,
        "micro_batches": workload.micro_batches,
        "recompute": workload.plan.recompute,
        "fits": prediction.fits,
        "memory": _memory(prediction),
        "seconds": {**step.parts, "total": step.total},
        "tokens_per_second": rate,
        "mfu": time.mfu(workload, prediction.cluster, step.total),
        "tokens": tokens,
        "days": None if tokens is None else tokens / rate / SECONDS_PER_DAY,
        "reasons": list(reasons(prediction)),
        "toml": toml(workload, phase.name),
    }


def _memory(prediction: Prediction) -> list[dict[str, Any]]:
    """Bytes per GPU of each pipeline stage; neighbours that are equal share an entry."""
    entries: list[dict[str, Any]] = []
    for stage, memory in zip(prediction.workload.stages, prediction.memory, strict=True):
        entry = {
            "layers": len(stage.layers),
            **memory.parts,
            "allocated": memory.allocated,
            "on_device": memory.on_device(prediction.cluster.gpus),
            "moment": memory.moment,
        }
        if entries and {**entries[-1], "stages": []} == {**entry, "stages": []}:
            entries[-1]["stages"].append(stage.index)
        else:
            entries.append({"stages": [stage.index], **entry})
    return entries


def _parameters(workload: Workload) -> dict[str, int]:
    counts = count_params(workload.spec)
    return {
        "total": counts.total,
        "activated": counts.activated,
        "trainable": trainable_parameters(workload.spec, workload.plan.adapter),
    }


def _cluster(cluster: Cluster) -> dict[str, Any]:
    hardware = cluster.hardware
    return {
        "gpu": hardware.name,
        "gpus": cluster.gpus,
        "gpus_per_node": cluster.gpus_per_node,
        "memory_bytes": hardware.memory_bytes,
        "bf16_flops": hardware.peak("bfloat16"),
        "memory_bandwidth": hardware.memory_bandwidth,
        "link_bandwidth": hardware.link_bandwidth,
        "network_bandwidth": hardware.network_bandwidth,
    }


def _token_shares(phases: Sequence[Phase], tokens: float | None) -> list[float | None]:
    """Tokens of each phase; ``tokens`` is divided as the recipe's steps are."""
    own = [
        None if phase.steps is None else float(phase.steps * phase.workload.tokens_per_step)
        for phase in phases
    ]
    if tokens is None:
        return list(own)
    if len(phases) == 1:
        return [tokens]
    known = [size for size in own if size is not None]
    return [tokens * size / sum(known) for size in known]


def _explicit(workload: Workload, degrees: Degrees, cluster: Cluster) -> Prediction:
    degrees = degrees.fill(cluster.gpus)
    check_degrees(
        workload.spec,
        degrees,
        seq_len=workload.seq_len,
        batch_rows=workload.batch_rows,
        micro_batch_rows=workload.plan.micro_batch_rows,
    )
    if workload.plan.adapter is not None and degrees.tp * degrees.pp > 1:
        raise ConfigError(
            "adapters train with data and context parallelism only; set parallel.tp=1 and "
            "parallel.pp=1"
        )
    settled = replace(workload, plan=replace(workload.plan, parallel=degrees))
    return Prediction(workload=settled, cluster=cluster)


def _check_float8(workload: Workload, cluster: Cluster) -> None:
    if workload.plan.float8 and not cluster.hardware.float8:
        raise ConfigError(
            f"{cluster.hardware.name} has no float8 tensor cores; set train.float8=false"
        )


def _nothing_fits(workload: Workload, cluster: Cluster) -> str:
    """One line: what is missing, and what would help."""
    name, gpus = cluster.hardware.name, cluster.gpus
    least = least_memory(workload, cluster)
    if least is None:
        return (
            f"{gpus} GPUs cannot share batch_rows={workload.batch_rows} rows of "
            f"{workload.seq_len} tokens evenly; change --gpus or train.batch_rows so that one "
            "divides the other"
        )
    has, mesh = _gib(cluster.hardware.memory_bytes), least.workload.degrees.describe()
    return (
        f"nothing fits {gpus} x {name} of {has}: the least, {mesh} with one row at a time and full "
        f"recomputation, needs {_gib(least.needs)} per GPU; "
        + "; or ".join(_remedies(workload, cluster))
    )


def _remedies(workload: Workload, cluster: Cluster) -> list[str]:
    found = []
    enough = smallest_cluster(workload, cluster)
    if enough is not None:
        found.append(f"take {enough} GPUs")
    elif workload.seq_len > 1:
        found.append("lower seq_len or take GPUs with more memory")
    if workload.plan.adapter is None and workload.spec.moe is None:
        for recipe, quantize in _ADAPTER_RECIPES.items():
            adapter = LoRAPlan(
                rank=16, alpha=32.0, targets=AdapterConfig().targets, quantize=quantize
            )
            smaller = replace(workload, plan=replace(workload.plan, adapter=adapter, float8=False))
            least = least_memory(smaller, cluster)
            if least is not None and least.fits:
                found.append(f"train adapters instead (recipe {recipe})")
                break
    return found


def _notes(workload: Workload) -> list[str]:
    notes = []
    if workload.spec.moe is not None:
        notes.append("no backend of this release trains a mixture of experts")
    if workload.dtype == "float32":
        notes.append("float32 products run outside the tensor cores; set dtype=bfloat16")
    return notes


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
