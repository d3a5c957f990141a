"""Fresh parameters from the schema, the same on every backend, device and number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

import numpy as np
import torch
from torch import nn

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit_torch.train.parameters import fill


def init_parameters(parameters: Mapping[str, nn.Parameter], spec: ModelSpec, seed: int) -> None:
    """Fill ``parameters``: matrices N(0, initializer_range), norms 1, biases 0.

    Every parameter draws from a stream of its own, keyed by ``seed`` and its name. Parameters of
    the schema that are not among ``parameters`` (another pipeline stage's) are passed over.
    """
    for param in schema(spec):
        target = parameters.get(param.name)
        if target is None:
            continue
        if param.init == "normal":
            stream = parameter_stream(seed, param.name)
            values = stream.standard_normal(param.size, dtype=np.float32)
            values *= np.float32(spec.initializer_range)
            fill(target, torch.from_numpy(values).view(param.shape))
        else:
            with torch.no_grad():
                target.fill_(1.0 if param.init == "ones" else 0.0)


def parameter_stream(seed: int, name: str) -> np.random.Generator:
    """The random stream of the parameter called ``name``, independent of all others."""
    key = int.from_bytes(sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=np.array([seed, key], dtype=np.uint64)))
