"""Master weights from a checkpoint: every process takes its part of each tensor."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from qwen2kit.backend.plan import LoRAPlan
from qwen2kit.backend.protocol import LoadReport
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit.weights.match import check_fits
from qwen2kit.weights.source import WeightSource
from qwen2kit_torch.lora_weights import (
    initial_factors,
    load_base,
    load_factors,
    stored_tensors,
)
from qwen2kit_torch.model import Qwen2
from qwen2kit_torch.train.parameters import fill
from qwen2kit_torch.weights import as_tensor


def load_parameters(
    parameters: Mapping[str, nn.Parameter], spec: ModelSpec, weights: WeightSource
) -> LoadReport:
    """Fill ``parameters`` from canonical tensors, strictly.

    Parameters of the schema that are not among ``parameters`` (another stage's) are not read.

    Raises:
        WeightError: names or shapes do not fit.
    """
    started = time.perf_counter()
    check_fits(spec, weights)
    total = 0
    for param in schema(spec):
        target = parameters.get(param.name)
        if target is None:
            continue
        host = weights.read(param.name)
        total += host.nbytes
        fill(target, as_tensor(host))
    return LoadReport(tensors=len(parameters), bytes=total, seconds=time.perf_counter() - started)


def load_adapted(
    network: Qwen2, plan: LoRAPlan, weights: WeightSource, device: torch.device
) -> LoadReport:
    """Fill the frozen weights of a network with adapters, and start the adapters anew.

    Raises:
        WeightError: names or shapes do not fit.
    """
    started = time.perf_counter()
    check_fits(network.spec, weights)
    parameters = dict(network.named_parameters())
    if not any(isinstance(p, DTensor) for p in parameters.values()):
        total = load_base(network, weights, device)
        load_factors(network, initial_factors(network, plan.seed))
    else:
        total = 0
        for param in schema(network.spec):
            host = weights.read(param.name)
            total += host.nbytes
            for name, value in stored_tensors(network, param.name, as_tensor(host)):
                fill(parameters[name], value)
        for name, value in initial_factors(network, plan.seed):
            fill(parameters[name], value)
    return LoadReport(
        tensors=len(schema(network.spec)), bytes=total, seconds=time.perf_counter() - started
    )
