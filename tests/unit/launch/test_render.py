"""Job files: what they say, what they refuse, and whether a shell and an SDK understand them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import fields, replace
from importlib.resources import files
from typing import Any

import pytest

from qwen2kit.errors import ConfigError
from qwen2kit.launch.render import KubernetesJob, SlurmJob
from tests.run_cli import run_cli

yaml = pytest.importorskip("yaml")

AWKWARD = "data.paths=['it''s $HOME \"x\"/*.txt']"
SLURM = SlurmJob(
    name="pretrain",
    run_dir="/runs/a b",
    command=("python", "-m", "qwen2kit", "train", "pretrain", AWKWARD, "--auto-resume"),
    nodes=4,
    processes_per_node=8,
    gpus_per_node=8,
    cpus_per_process=12,
    time="2-00:00:00",
    options=("--partition=gpu",),
    setup=("module load cuda", "source venv/bin/activate"),
)
KUBERNETES = KubernetesJob(
    name="pretrain",
    image="registry.example/qwen2kit:0.1",
    command=("torchrun", "-m", "qwen2kit", "train", "pretrain", AWKWARD),
    nodes=4,
    processes_per_node=8,
    gpus_per_node=8,
    claim="runs",
    mount="/mnt/qwen2kit",
)


@pytest.mark.parametrize(
    ("template", "job"), [("slurm.sbatch", SlurmJob), ("pytorchjob.yaml", KubernetesJob)]
)
def test_templates_use_every_field_and_no_other(template: str, job: type[Any]) -> None:
    text = (files("qwen2kit.launch") / template).read_text()
    inside = re.findall(r"\{[{%](.*?)[}%]\}", text)
    words = set(re.findall(r"[a-z_]{4,}", re.sub(r'"[^"]*"', "", " ".join(inside))))
    names = {field.name for field in fields(job)}
    assert names <= words
    assert words - names <= {"endif", "endfor", "option", "line", "part", "json", "join", "string"}


def test_the_batch_script_is_sound_bash_with_the_options_asked_for() -> None:
    script = SLURM.render()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options = set(re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE))
    assert options == {
        "--job-name=pretrain", "--nodes=4", "--ntasks-per-node=8", "--cpus-per-task=12",
        "--gpus-per-node=8", "--time=2-00:00:00", "--output=pretrain-%j.log",
        "--open-mode=append", "--requeue", "--signal=USR1@300", "--partition=gpu",
    }  # fmt: skip
    assert script.index("module load cuda") < script.index("source venv") < script.index("srun")
    plain = replace(SLURM, gpus_per_node=0, cpus_per_process=0, setup=(), options=()).render()
    assert "gpus" not in plain
    assert "cpus" not in plain.lower()


def fake_cluster(status: int) -> str:
    """Shell functions in place of SLURM's programs; srun becomes one process and its status."""
    return (
        "scontrol() { if [ $1 = show ]; then echo first; echo second; else echo $1 $2; fi; }\n"
        'srun() { shift 2; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=32 "$@"; '
        f"return {status}; }}\n"
        "export SLURM_JOB_ID=123456 SLURM_JOB_NODELIST=x SLURM_CPUS_PER_TASK=12\n"
    )


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        (0, 0, False),
        (138, 0, True),
        (138, 9, True),
        (137, 2, True),
        (137, 3, False),
        (139, 0, True),
        (143, 0, False),
        (5, 0, False),
    ],
)
def test_the_batch_script_hands_arguments_over_and_requeues_what_it_should(
    status: int, restarts: int, requeued: bool
) -> None:
    show = (
        "python", "-c",
        "import os, sys, json; names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', "
        "'MASTER_PORT'); print(json.dumps([sys.argv[1], *map(os.environ.get, names)]))",
        AWKWARD,
    )  # fmt: skip
    script = fake_cluster(status) + replace(SLURM, setup=(), command=show).render()
    done = subprocess.run(
        ["bash"], input=f"export SLURM_RESTART_COUNT={restarts}\n{script}",
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    lines = done.stdout.splitlines()
    assert json.loads(lines[0]) == [AWKWARD, "3", "1", "32", "first", str(20000 + 123456 % 10000)]
    assert lines[1:] == (["requeue 123456"] if requeued else [])


def understand(value: Any, kind: str, models: Any, path: str = "") -> None:
    """Check ``value`` against a model of the SDK: known keys only, and the right types."""
    if kind.startswith("dict("):
        for key, item in value.items():
            understand(item, kind[5:-1].split(", ")[1], models, f"{path}.{key}")
    elif kind.startswith("list["):
        for number, item in enumerate(value):
            understand(item, kind[5:-1], models, f"{path}[{number}]")
    elif kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, f"{path} must be a {kind}"
    elif kind != "object":
        model = next(getattr(m, kind) for m in models if hasattr(m, kind))
        names = {key: name for name, key in model.attribute_map.items()}
        assert value.keys() <= names.keys(), f"{path}: {value.keys() - names.keys()}"
        for key, item in value.items():
            understand(item, model.openapi_types[names[key]], models, f"{path}.{key}")


def test_the_manifest_is_what_the_training_operators_sdk_knows() -> None:
    training = pytest.importorskip("kubeflow.training.models")
    core = pytest.importorskip("kubernetes.client.models")
    job = yaml.safe_load(KUBERNETES.render())
    understand(job, "KubeflowOrgV1PyTorchJob", (training, core))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"]["nprocPerNode"] == "8"
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert [replicas[kind]["replicas"] for kind in ("Master", "Worker")] == [1, 3]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert tuple(container["command"]) == KUBERNETES.command
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    wrong = job | {"spec": job["spec"] | {"nprocPerNode": 8}}
    with pytest.raises(AssertionError, match="nprocPerNode must be a str"):
        understand(wrong, "KubeflowOrgV1PyTorchJob", (training, core))
    single = yaml.safe_load(replace(KUBERNETES, nodes=1, gpus_per_node=0).render())
    assert single["spec"]["pytorchReplicaSpecs"].keys() == {"Master"}


def test_what_cannot_be_a_job_is_refused() -> None:
    cases: dict[str, tuple[SlurmJob | KubernetesJob, dict[str, Any]]] = {
        "a job name holds": (SLURM, {"name": "a b"}),
        "time must look like": (SLURM, {"time": "soon"}),
        "options must look like": (SLURM, {"options": ("partition=gpu",)}),
        "nodes must be at least 1": (SLURM, {"nodes": 0}),
        "must be one line": (SLURM, {"run_dir": "a\nb"}),
        "name must be a DNS label": (KUBERNETES, {"name": "Pre_train"}),
        "namespace must be a DNS label": (KUBERNETES, {"namespace": ""}),
        "mount must be an absolute path": (KUBERNETES, {"mount": "runs"}),
    }
    for message, (job, changes) in cases.items():
        with pytest.raises(ConfigError, match=message):
            replace(job, **changes)


def test_the_command_line_checks_the_recipe_and_prints_the_job() -> None:
    done = run_cli(
        "launch", "slurm", "tiny", "train.micro_batch_rows=2", "--run-dir", "runs/x",
        "--nodes", "2", "--gpus-per-node", "4", "--python", "python3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = next(line for line in done.stdout.splitlines() if line.startswith("' process "))
    words = shlex.split(command[2:])
    assert words[1:7] == ["python3", "-m", "qwen2kit", "train", "tiny", "train.micro_batch_rows=2"]
    assert words[7] == "--run-dir"
    assert words[8].endswith("/runs/x")
    assert words[9] == "--auto-resume"
    pod = ("--image", "i", "--claim", "c")
    for message, args in {
        "micro_batch_rows=16 does not divide the 8 rows": (
            "slurm", "tiny", "--run-dir", "x", "--nodes", "2",
        ),
        "8 processes cannot be divided by tp=3 = 3": (
            "slurm", "tiny", "parallel.tp=3", "--run-dir", "x", "--nodes", "8",
        ),
        "tp=16 does not divide num_key_value_heads=2": (
            "slurm", "pretrain", "parallel.tp=16", "--run-dir", "x", "--nodes", "16",
        ),
        "train.lrr: unknown key": ("slurm", "tiny", "train.lrr=3", "--run-dir", "x"),
        "must lie under --mount": ("kubernetes", "tiny", "--run-dir", "/x", *pod),
    }.items():  # fmt: skip
        done = run_cli("launch", *args)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
