"""Runs a function on several processes (gloo, or NCCL with a GPU each), forked from a server that
has torch loaded once."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_PATIENCE = 600  # for what hangs, however busy the machine is
LOADED = [
    "jinja2", "pydantic", "tokenizers", "torch.distributed.pipelining", "qwen2kit_torch.backend",
    "qwen2kit_torch.train.model", "qwen2kit.train.run", "tests.conftest", "tests.parallel.curves",
    "tests.parallel.runs",
]  # fmt: skip
"""Loaded by the server: there is one, and who starts it settles what."""


def run_on(
    world: int, function: Callable[..., Any], folder: Path, *arguments: Any, gpus: bool = False
) -> list[Any]:
    """``function(*arguments)`` on ``world`` processes as torchrun would start them.

    Returns what each returned, by rank; raises the first failure with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    store = folder / f"store-{os.getpid()}-{len(list(folder.iterdir()))}"
    pipes, children = [], []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(
            target=_work, args=(rank, world, str(store), sender, gpus, function, arguments)
        )
        child.start()
        sender.close()
        pipes.append(receiver)
        children.append(child)
    try:
        outcomes = [pipe.recv() if pipe.poll(_PATIENCE) else (False, "no answer") for pipe in pipes]
    except EOFError:
        outcomes = [(False, "a process died")]
    finally:
        for child in children:
            child.join(5)
            child.kill()
    failures = [value for sound, value in outcomes if not sound]
    assert not failures, failures[0]
    return [value for _, value in outcomes]


def _work(
    rank: int,
    world: int,
    store: str,
    answer: Connection,
    gpus: bool,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(_PATIENCE - 30)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if gpus:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
        )
        answer.send((True, function(*arguments)))
        dist.barrier()
    except BaseException:
        answer.send((False, f"rank {rank}: {traceback.format_exc()}"))
    finally:
        answer.close()
        os._exit(0)
