"""``qwen2kit eval --nproc N``: start the processes, and what each of them does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2kit.cli.abandon import abandon
from qwen2kit.errors import BackendError, PeerError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit.backend.processes import Processes
    from qwen2kit.backend.protocol import DistributedBackend
    from qwen2kit_evals.job import Job
    from qwen2kit_evals.team import Team


def launch(job: Job, directory: Path, processes: int, flags: Sequence[str]) -> int:
    """Evaluate in ``processes`` processes of this machine; their exit code.

    Raises:
        Qwen2KitError: the backend runs one process only, or the directory cannot be used.
    """
    from qwen2kit.launch.local import run_here
    from qwen2kit_evals.results import RUN_FILE

    backend = _distributed(job.backend)
    new = not directory.exists()
    job.begin(directory)
    arguments = ["eval", "--resume", str(directory), *flags]
    code = run_here(backend, processes, 0, arguments)
    if code and new and [path.name for path in directory.iterdir()] == [RUN_FILE]:
        (directory / RUN_FILE).unlink()  # nothing was begun that could go on
        directory.rmdir()
    return code


def join(job: Job) -> Processes:
    """The processes that a launcher (``--nproc``, ``torchrun``) has started, or this one alone.

    Raises:
        BackendError: there are several, and the backend runs one only.
    """
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.backend.processes import SingleProcess

    if os.environ.get("WORLD_SIZE", "1") == "1":
        return SingleProcess()
    return _distributed(job.backend).processes(ExecutionPlan(device=job.device, dtype=job.dtype))


def team_of(processes: Processes, directory: Path) -> AbstractContextManager[Team | None]:
    """The others, where there are any."""
    from qwen2kit_evals.team import Team

    return nullcontext() if processes.world == 1 else Team(directory.resolve(), processes)


def answer_for(processes: Processes, load: Callable[[], LoadedModel], job: Job) -> None:
    """What a process other than 0 does.

    Raises:
        PeerError: another process is gone; it says why.
    """
    from qwen2kit_evals.team import work_for_team

    try:
        work_for_team(processes, load, job.batch_size)
    except Exception as error:
        if _distributed(job.backend).lost_process(error):
            raise PeerError(f"lost another process: {error}") from error
        raise


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes, only the one that knows what went wrong says so."""
    try:
        yield
    except BaseException as error:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            abandon(error)
        raise


def _distributed(name: str) -> DistributedBackend:
    from qwen2kit.backend.protocol import DistributedBackend
    from qwen2kit.backend.registry import get

    backend = get(name)
    if not isinstance(backend, DistributedBackend):
        raise BackendError(f"backend {backend.name!r} runs in one process only; leave --nproc out")
    return backend
