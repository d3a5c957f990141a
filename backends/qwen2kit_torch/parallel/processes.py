"""Joining the other processes of a run, as ``torchrun`` announced them in the environment."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qwen2kit.backend.processes import Processes, SingleProcess
from qwen2kit.errors import BackendError

# How long a collective waits for a process that may have died.
_PATIENCE = timedelta(minutes=10)


def connect(device: str) -> Processes:
    """The processes of this run; `SingleProcess` if no launcher has set ``WORLD_SIZE``.

    CUDA devices talk through NCCL, CPUs through gloo. Each process takes the CUDA device of its
    ``LOCAL_RANK``.

    Args:
        device: the plan's device: ``cpu`` forces gloo.

    Raises:
        BackendError: the others cannot be reached, or there are fewer devices than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return SingleProcess()
    cuda = torch.cuda.is_available() and device != "cpu"
    if not dist.is_initialized():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if cuda and local >= torch.cuda.device_count():
            raise BackendError(
                f"process {local} of this machine has no GPU: {torch.cuda.device_count()} are "
                "visible; start as many processes per machine as it has GPUs"
            )
        if cuda:
            torch.cuda.set_device(local)
        try:
            store, rank, world = next(rendezvous("env://"))
            # torchrun keeps its store over restarts, with the addresses of the processes it lost.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=PrefixStore(f"attempt-{attempt}", store),
                rank=rank,
                world_size=world,
                timeout=_PATIENCE,
                device_id=torch.device("cuda", local) if cuda else None,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BackendError(f"cannot join the other processes: {reason}") from error
    return TorchProcesses()


# What gloo, NCCL and the key-value store say in errors of no type of their own.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Connection refused|remote process exited|"
    r"NCCL communicator was aborted|Timed out waiting|Application timeout|Socket (Timeout|closed)",
    re.IGNORECASE,
)


def lost_process(error: Exception) -> bool:
    """Whether ``error`` comes from a collective whose other side is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


class TorchProcesses:
    """`qwen2kit.backend.processes.Processes` over the default process group.

    Attributes:
        rank, world: of this process, and how many there are.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process."""
        votes = torch.tensor(int(flag), dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def share(self, value: Any) -> Any:
        """Process 0's ``value`` on every process."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
