"""Fresh parameters from the schema, the same on every backend, device and number of processes.

A matrix is drawn in blocks of rows with a random stream each, so that a process draws only the
blocks it holds a part of, on all of its cores: 7.6 billion values in one stream take a core a
hundred seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor, nn

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import Param, schema
from qwen2kit_torch.train.parameters import Region, parts

BLOCK = 1 << 20
"""Values of a block, unless one row has more."""


def init_parameters(parameters: Mapping[str, nn.Parameter], spec: ModelSpec, seed: int) -> None:
    """Fill ``parameters``: matrices N(0, initializer_range), norms 1, biases 0.

    Parameters of the schema that are not among ``parameters`` (another pipeline stage's) are
    passed over.
    """
    drawn: list[Future[None]] = []
    with ThreadPoolExecutor(_threads()) as pool:
        for param in schema(spec):
            target = parameters.get(param.name)
            if target is None:
                continue
            if param.init != "normal":
                with torch.no_grad():
                    target.fill_(1.0 if param.init == "ones" else 0.0)
                continue
            for local, region in parts(target):
                for block in _blocks(param, region[0]):
                    job = (param, seed, spec.initializer_range, block, local, region)
                    drawn.append(pool.submit(_draw, *job))
    for job_done in drawn:
        job_done.result()


def parameter_stream(seed: int, name: str, block: int = 0) -> np.random.Generator:
    """The random stream of a block of the parameter called ``name``, independent of all others."""
    label = f"{name}[{block}]" if block else name
    key = int.from_bytes(sha256(label.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=np.array([seed, key], dtype=np.uint64)))


def _rows(param: Param) -> int:
    """Rows of a block."""
    return max(1, BLOCK * param.shape[0] // param.size)


def _blocks(param: Param, rows: slice) -> Iterator[int]:
    """Numbers of the blocks that hold a part of ``rows``."""
    height = _rows(param)
    return iter(range(rows.start // height, -(-rows.stop // height)))


def _draw(
    param: Param, seed: int, deviation: float, block: int, local: Tensor, region: Region
) -> None:
    """Fill what ``local``, the ``region`` of the parameter, holds of a block."""
    first = block * _rows(param)
    shape = (min(_rows(param), param.shape[0] - first), *param.shape[1:])
    values = parameter_stream(seed, param.name, block).standard_normal(shape, dtype=np.float32)
    values *= np.float32(deviation)
    rows, others = region[0], region[1:]
    start, stop = max(rows.start, first), min(rows.stop, first + shape[0])
    part = torch.from_numpy(values[start - first : stop - first])[(slice(None), *others)]
    with torch.no_grad():
        local[start - rows.start : stop - rows.start].copy_(part)


def _threads() -> int:
    """Cores for each process of this machine."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
