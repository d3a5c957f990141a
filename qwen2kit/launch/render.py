"""Job files for clusters from the templates in this folder.

A name that a template uses and a job does not have is an error, and so is the reverse (a test):
nothing is filled in silently.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, dataclass
from importlib.resources import files

from qwen2kit.config.node import check


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """A batch script: one task per process, restarted by requeueing.

    Attributes:
        name: of the job and its log file.
        run_dir: named in the script's first lines.
        command: what every process runs.
        nodes, processes_per_node: their product is the number of processes.
        gpus_per_node: 0 asks for none.
        cpus_per_process: 0 leaves it to the cluster.
        time: limit per allocation, as ``sbatch`` takes it, e.g. ``24:00:00``.
        grace_seconds: how long before that limit the processes are told to save and stop.
        max_restarts: requeues after a process was killed.
        options: more ``#SBATCH`` options, e.g. ``--partition=gpu``.
        setup: shell lines before the processes start, e.g. ``module load cuda``.
    """

    name: str
    run_dir: str
    command: tuple[str, ...]
    nodes: int
    processes_per_node: int
    gpus_per_node: int = 0
    cpus_per_process: int = 0
    time: str = "24:00:00"
    grace_seconds: int = 300
    max_restarts: int = 3
    options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(
            *_positive(self.nodes, self.processes_per_node, self.grace_seconds),
            (
                re.fullmatch(r"[\w.-]+", self.name) is not None,
                f"a job name holds letters, digits, '.', '_' and '-', got {self.name!r}",
            ),
            (
                re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time) is not None,
                f"time must look like 24:00:00 or 2-12:00:00, got {self.time!r}",
            ),
            (
                all(option.startswith("--") and "\n" not in option for option in self.options),
                f"options must look like --partition=gpu, got {list(self.options)}",
            ),
            ("\n" not in self.run_dir, "the run directory's name must be one line"),
        )

    def render(self) -> str:
        """The script, for ``sbatch``."""
        return _render("slurm.sbatch", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesJob:
    """A ``PyTorchJob`` of the Kubeflow training operator: one pod per node.

    Attributes:
        name: of the job; a DNS label.
        image: container image with ``qwen2kit[torch]`` installed.
        command: what every pod runs (``torchrun ...``).
        nodes, processes_per_node: pods, and processes in each.
        gpus_per_node: 0 asks for none.
        namespace: where the job goes.
        claim, mount: persistent volume claim that all pods share, and where they see it; run
            directory, recipe and data must lie on it.
        grace_seconds: time to save after SIGTERM.
        max_restarts: of each pod.
    """

    name: str
    image: str
    command: tuple[str, ...]
    nodes: int
    processes_per_node: int
    gpus_per_node: int
    claim: str
    mount: str
    namespace: str = "default"
    grace_seconds: int = 600
    max_restarts: int = 10

    def __post_init__(self) -> None:
        check(
            *_positive(self.nodes, self.processes_per_node, self.grace_seconds),
            *(
                (
                    re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", value) is not None,
                    f"{what} must be a DNS label (a-z, 0-9, '-'), got {value!r}",
                )
                for what, value in (("name", self.name), ("namespace", self.namespace))
            ),
            (self.mount.startswith("/"), f"mount must be an absolute path, got {self.mount!r}"),
        )

    def render(self) -> str:
        """The manifest, for ``kubectl apply -f -``."""
        return _render("pytorchjob.yaml", self)


def _positive(nodes: int, processes_per_node: int, grace_seconds: int) -> list[tuple[bool, str]]:
    values = {
        "nodes": nodes,
        "processes per node": processes_per_node,
        "grace seconds": grace_seconds,
    }
    return [
        (value >= 1, f"{what} must be at least 1, got {value}") for what, value in values.items()
    ]


def _render(template: str, job: SlurmJob | KubernetesJob) -> str:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"quote": shlex.quote, "json": json.dumps}
    text = (files("qwen2kit.launch") / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(asdict(job))
