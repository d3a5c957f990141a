"""``qwen2kit launch``: job files that train on a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qwen2kit.config.tree import RunConfig

launch = typer.Typer(
    help="Print job files that train on a cluster and go on by themselves after a failure.",
    rich_markup_mode=None,
)

Recipe = Annotated[
    str, typer.Argument(help="A TOML file or the name of a shipped recipe, as in qwen2kit train.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as in train.")
]
RunDir = Annotated[
    Path, typer.Option(help="Directory of the run, on a file system that all nodes share.")
]
Nodes = Annotated[int, typer.Option(min=1, help="Machines.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs to ask for per machine.")]
PerNode = Annotated[
    int | None, typer.Option(min=1, help="Processes per machine; default: one per GPU, or one.")
]
Name = Annotated[str | None, typer.Option(help="Of the job; default: the recipe's.")]


@launch.command()
def slurm(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    run_dir: RunDir,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 0,
    processes_per_node: PerNode = None,
    cpus_per_process: Annotated[int, typer.Option(min=0, help="0: the cluster's default.")] = 0,
    time: Annotated[str, typer.Option(help="Limit of one allocation.")] = "24:00:00",
    grace: Annotated[int, typer.Option(min=1, help="Seconds to save before that limit.")] = 300,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Requeues after a process was killed.")
    ] = 3,
    option: Annotated[
        list[str] | None, typer.Option(help="An #SBATCH option, e.g. --option=--partition=gpu.")
    ] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="A shell line to run first, e.g. 'module load cuda'.")
    ] = None,
    name: Name = None,
    python: Annotated[
        str, typer.Option(help="Interpreter on the nodes; default: this one.")
    ] = sys.executable,
) -> None:
    """Print a batch script: qwen2kit launch slurm ... > job.sbatch; sbatch job.sbatch

    Before the time limit the run saves, and the job goes back into the queue; a killed process or
    a lost node puts it there too.
    """
    from qwen2kit.launch.render import SlurmJob

    per_node = processes_per_node or max(1, gpus_per_node)
    config, arguments = _request(recipe, overrides or [], run_dir.absolute(), nodes * per_node)
    job = SlurmJob(
        name=name or config.name,
        run_dir=str(run_dir.absolute()),
        command=(python, "-m", "qwen2kit", *arguments),
        nodes=nodes,
        processes_per_node=per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_process=cpus_per_process,
        time=time,
        grace_seconds=grace,
        max_restarts=max_restarts,
        options=tuple(option or ()),
        setup=tuple(setup or ()),
    )
    sys.stdout.write(job.render())


@launch.command()
def kubernetes(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    run_dir: RunDir,
    image: Annotated[str, typer.Option(help="Container image with qwen2kit[torch] in it.")],
    claim: Annotated[str, typer.Option(help="Persistent volume claim shared by all pods.")],
    mount: Annotated[str, typer.Option(help="Where the pods see it.")] = "/mnt/qwen2kit",
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 0,
    processes_per_node: PerNode = None,
    namespace: Annotated[str, typer.Option(help="Of the job.")] = "default",
    grace: Annotated[int, typer.Option(min=1, help="Seconds to save after SIGTERM.")] = 600,
    max_restarts: Annotated[int, typer.Option(min=0, help="Restarts of a pod.")] = 10,
    name: Name = None,
) -> None:
    """Print a PyTorchJob manifest: qwen2kit launch kubernetes ... | kubectl apply -f -"""
    from qwen2kit.errors import ConfigError
    from qwen2kit.launch.render import KubernetesJob

    if not run_dir.is_relative_to(mount):
        raise ConfigError(f"--run-dir {run_dir} must lie under --mount {mount}")
    per_node = processes_per_node or max(1, gpus_per_node)
    config, arguments = _request(recipe, overrides or [], run_dir, nodes * per_node)
    job = KubernetesJob(
        name=name or config.name.lower().replace("_", "-"),
        image=image,
        command=("torchrun", "-m", "qwen2kit", *arguments),
        nodes=nodes,
        processes_per_node=per_node,
        gpus_per_node=gpus_per_node,
        namespace=namespace,
        claim=claim,
        mount=mount,
        grace_seconds=grace,
        max_restarts=max_restarts,
    )
    sys.stdout.write(job.render())


def _request(
    recipe: str, changes: list[str], run_dir: Path, processes: int
) -> tuple[RunConfig, list[str]]:
    """The recipe, checked here rather than in the queue, and the arguments that train it."""
    from qwen2kit.config.load import load_recipe
    from qwen2kit.spec.presets import preset
    from qwen2kit.train.phases import phases
    from qwen2kit.train.setup import apply_overrides, degrees

    config = load_recipe(recipe, changes)
    degrees(config, processes)
    if config.model.preset is not None:  # of a checkpoint this machine may know nothing
        phases(config, apply_overrides(preset(config.model.preset), config.model), processes)
    source = Path(recipe)
    named = str(source.absolute()) if source.is_file() else recipe
    options = ["--run-dir", str(run_dir), "--auto-resume"]
    return config, ["train", named, *changes, *options]
