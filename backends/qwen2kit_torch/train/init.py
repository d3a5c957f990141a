"""Fresh parameters from the schema, the same on every backend, device and number of processes."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import torch
from torch import nn

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema


def init_parameters(module: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fill ``module``'s parameters: matrices N(0, initializer_range), norms 1, biases 0.

    Every parameter draws from a stream of its own, keyed by ``seed`` and its name.
    """
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for param in schema(spec):
            target = parameters[param.name]
            if param.init == "normal":
                values = parameter_stream(seed, param.name).standard_normal(param.size, dtype=np.float32)
                values *= np.float32(spec.initializer_range)
                target.copy_(torch.from_numpy(values).view(param.shape))
            else:
                target.fill_(1.0 if param.init == "ones" else 0.0)


def parameter_stream(seed: int, name: str) -> np.random.Generator:
    """The stream of random numbers that the parameter ``name`` draws its values from."""
    key = int.from_bytes(sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=np.array([seed, key], dtype=np.uint64)))
