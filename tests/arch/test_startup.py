"""Starting the command line must cost nothing: time and imported modules."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = {
    "torch", "mlx", "transformers", "mlx_lm", "lm_eval", "datasets", "numpy", "pydantic",
    "tokenizers", "safetensors", "gguf", "jinja2", "huggingface_hub", "pyarrow", "matplotlib",
    "rich", "fastapi", "uvicorn", "starlette", "qwen2kit_torch", "qwen2kit_mlx", "qwen2kit_evals",
}  # fmt: skip
COMMANDS = (
    "train", "convert", "chat", "eval", "parity", "inspect", "plan", "doctor", "demo", "data",
    "launch", "serve",
)  # fmt: skip
LIMIT_SECONDS = 0.3

PROBE = """
import sys
from qwen2kit.cli.app import main
sys.argv = ["qwen2kit", *sys.argv[1:]]
try:
    main()
except SystemExit as leave:
    assert not leave.code, leave.code
print("MODULES", *sorted({name.split(".")[0] for name in sys.modules}))
"""


def _seconds() -> float:
    """Processor time of ``qwen2kit --help``, or wall time where that is less.

    Start-up is bound by the processor, and its time does not depend on what else runs here.
    """
    resource = pytest.importorskip("resource")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "qwen2kit", "--help"], capture_output=True, text=True, check=True
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    assert all(command in done.stdout for command in COMMANDS)
    return min(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def test_help_is_instant() -> None:
    best = min(_seconds() for _ in range(5))
    assert best < LIMIT_SECONDS, f"qwen2kit --help took {best:.2f} s"


@pytest.mark.parametrize("arguments", [(), *((command,) for command in COMMANDS)], ids="-".join)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rsplit("MODULES", 1)[1].split())
    assert "qwen2kit" in loaded
    # Typer itself loads pydantic to parse a command's own arguments.
    assert loaded & HEAVY <= ({"pydantic"} if arguments else set())


@pytest.mark.parametrize("module", ["qwen2kit", "qwen2kit.errors", "qwen2kit.spec.schema",
                                    "qwen2kit.backend.registry"])  # fmt: skip
def test_importing_the_library_is_cheap(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {name.split(".")[0] for name in done.stdout.split()} & HEAVY == set()


def test_public_names_resolve() -> None:
    import qwen2kit

    assert set(qwen2kit.__all__) == {"__version__", *qwen2kit._PUBLIC}
    for name in qwen2kit.__all__:
        assert getattr(qwen2kit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qwen2kit.nothing
