"""``qwen2kit plan``: memory, time and a mesh for training a recipe on so many GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qwen2kit.plan.communication import Cluster

_GIB = 2**30
_STAGES_SHOWN = 8


def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe as in train, or a preset's name, e.g. qwen2-72b: the pretrain recipe "
            "with that model and 4 M tokens per step."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Changes, e.g. seq_len=8192. Degrees under parallel.* are taken as they are; "
            "without any, the fastest ones that fit are proposed.",
        ),
    ] = None,
    *,
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs.")],
    gpu: Annotated[
        str, typer.Option(help="Kind, e.g. h100, h200, b200, a100-80g, l40s, rtx-4090.")
    ] = "h100",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that share fast links.")] = 8,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens of the run, e.g. 7e12; default: the recipe's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Predict memory per GPU, time per step and days of a run, and propose how to divide it.

    Needs neither a GPU nor PyTorch nor the network.
    """
    from qwen2kit.cli.output import console, emit_json
    from qwen2kit.errors import ConfigError
    from qwen2kit.plan.recipe import phases_of, read, spec_of
    from qwen2kit.plan.report import report

    if tokens is not None and not 0 < tokens < float("inf"):
        raise ConfigError(f"--tokens must be a positive number, got {tokens}")
    cluster = _cluster(gpu, gpus, gpus_per_node)
    config = read(recipe, overrides or [])
    document = report(phases_of(config, spec_of(config.model)), cluster, tokens=tokens)
    if json:
        emit_json(document)
    else:
        _print(document, console())
    if not document["fits"]:
        raise ConfigError(_too_large(document))


def _cluster(gpu: str, gpus: int, gpus_per_node: int) -> Cluster:
    from qwen2kit.errors import ConfigError
    from qwen2kit.plan.communication import Cluster
    from qwen2kit.plan.hardware import NAMES, find_hardware

    hardware = find_hardware(gpu)
    if hardware is None:
        raise ConfigError(f"unknown GPU {gpu!r}; known: {', '.join(NAMES)}")
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise ConfigError(
            f"{gpus} GPUs are not whole nodes of {gpus_per_node}; change --gpus or --gpus-per-node"
        )
    return Cluster(hardware=hardware, gpus=gpus, gpus_per_node=gpus_per_node)


def _too_large(document: dict[str, Any]) -> str:
    worst = next(phase for phase in document["phases"] if not phase["plan"]["fits"])
    needs = max(entry["on_device"] for entry in worst["plan"]["memory"])
    has = document["cluster"]["memory_bytes"]
    remedy = "use one of the alternatives" if worst["alternatives"] else "take more GPUs"
    return (
        f"the recipe's degrees need {needs / _GIB:.1f} GiB per GPU with little to spare, a "
        f"{document['cluster']['gpu']} has {has / _GIB:.1f} GiB; {remedy}"
    )


def _print(document: dict[str, Any], screen: Console) -> None:
    cluster, parameters = document["cluster"], document["parameters"]
    _line(
        screen,
        f"{_count(parameters['total'])} parameters, {_count(parameters['activated'])} active per "
        f"token, {_count(parameters['trainable'])} trained",
        f"{cluster['gpus']} x {cluster['gpu']} of {cluster['memory_bytes'] / _GIB:.1f} GiB, "
        f"{cluster['gpus_per_node']} per node",
    )
    for phase in document["phases"]:
        _print_phase(phase, screen)
    if len(document["phases"]) > 1 and document["days"] is not None:
        _line(screen, f"all phases: {document['days']:.2f} days")


def _print_phase(phase: dict[str, Any], screen: Console) -> None:
    plan = phase["plan"]
    screen.print()
    screen.print(
        f"{phase['name']}: {phase['batch_rows']:,} rows of {phase['seq_len']:,} tokens per step, "
        f"{phase['dtype']}",
        style="bold",
        markup=False,
    )
    _line(screen, f"{_mesh(plan)} ({'proposed' if phase['proposed'] else 'as the recipe says'})")
    for reason in plan["reasons"] + phase["notes"]:
        _line(screen, f"  - {reason}")
    screen.print(_memory_table(plan["memory"]))
    screen.print(_time_table(plan["seconds"]))
    _line(
        screen,
        f"{plan['tokens_per_second']:,.0f} tokens/s, MFU {plan['mfu']:.1%}, "
        f"{phase['flops_per_token'] / 1e9:,.1f} GFLOP per token, "
        f"{phase['flops_per_token'] * phase['tokens_per_step'] / 1e15:,.1f} PFLOP per step",
        _duration(plan),
    )
    if phase["alternatives"]:
        screen.print(_alternatives_table(phase["alternatives"]))
    screen.print("\nin the recipe:", style="bold")
    _line(screen, plan["toml"])


def _memory_table(entries: list[dict[str, Any]]) -> Table:
    from qwen2kit.plan.memory import PARTS

    skipped = range(_STAGES_SHOWN - 1, len(entries) - 1)  # all but the first ones and the last
    shown = [entry for number, entry in enumerate(entries) if number not in skipped]
    several = len(entries) > 1
    table = _table("GiB per GPU at the fullest moment", header=several)
    table.add_column("")
    for entry in shown:
        first, last = entry["stages"][0], entry["stages"][-1]
        stages = f"stage {first}" if first == last else f"stages {first}-{last}"
        table.add_column(stages, justify="right")
    for part in (*PARTS, "allocated", "on_device"):
        name = part.replace("_", " ")
        table.add_row(name, *(f"{entry[part] / _GIB:.2f}" for entry in shown))
    table.add_row("moment", *(entry["moment"] for entry in shown))
    return table


def _time_table(seconds: dict[str, float]) -> Table:
    table = _table("seconds per step", header=False)
    for justify in ("left", "right", "right"):
        table.add_column(justify=justify)
    for part, value in seconds.items():
        if value:
            table.add_row(part, f"{value:.3g}", f"{value / seconds['total']:.0%}")
    return table


def _alternatives_table(alternatives: list[dict[str, Any]]) -> Table:
    table = _table("alternatives")
    for heading in ("mesh", "rows", "recompute", "seconds", "MFU", "GiB"):
        table.add_column(heading, justify="left" if heading == "mesh" else "right")
    for other in alternatives:
        table.add_row(
            _axes(other),
            str(other["micro_batch_rows"]),
            other["recompute"],
            f"{other['seconds']['total']:.3g}",
            f"{other['mfu']:.1%}",
            f"{max(entry['on_device'] for entry in other['memory']) / _GIB:.1f}",
        )
    return table


def _mesh(plan: dict[str, Any]) -> str:
    rows, recompute = plan["micro_batch_rows"], plan["recompute"]
    return f"{_axes(plan)}, micro-batches of {rows}, recompute {recompute}"


def _axes(plan: dict[str, Any]) -> str:
    axes = [f"{axis}={size}" for axis, size in plan["parallel"].items() if size > 1]
    return " x ".join(axes) or "one process"


def _duration(plan: dict[str, Any]) -> str:
    if plan["days"] is None:
        return "the recipe counts epochs: give --tokens for the time of the run"
    return f"{_count(plan['tokens'])} tokens take {plan['days']:.2f} days"


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,.0f}"


def _line(screen: Console, *texts: str) -> None:
    for text in texts:
        screen.print(text, markup=False, soft_wrap=True)


def _table(title: str, *, header: bool = True) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_header=header
    )
