"""Parameters of a module with LoRA adapters: first values, the base read, all of it out again."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn

from qwen2kit.adapters.lora import factor_names
from qwen2kit.spec.schema import schema
from qwen2kit.weights.source import WeightSource
from qwen2kit.weights.tensor import HostTensor
from qwen2kit_torch.lora import FrozenLinear, LoRALinear
from qwen2kit_torch.lora_nf4 import quantize
from qwen2kit_torch.model import Qwen2
from qwen2kit_torch.train.init import parameter_stream
from qwen2kit_torch.train.parameters import whole
from qwen2kit_torch.weights import as_host, as_tensor


def initial_factors(module: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Names and float32 CPU values of all adapter parameters: A as PEFT draws it, B zero.

    A is uniform within ``1 / sqrt(inputs)`` (Kaiming's bound for a slope of ``sqrt(5)``). Each
    draws from a stream of its own, keyed by ``seed`` and its name, so that values depend neither
    on the device nor on the number of processes.
    """
    for path, layer in _adapted(module):
        (name_a, name_b), (outputs, inputs) = factor_names(path), layer.shape
        rank = layer.lora_A.weight.shape[0]
        unit = parameter_stream(seed, name_a).random((rank, inputs), dtype=np.float32)
        yield name_a, torch.from_numpy((unit * 2 - 1) * np.float32(1 / sqrt(inputs)))
        yield name_b, torch.zeros(outputs, rank)


def stored_tensors(module: nn.Module, name: str, dense: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a canonical tensor is stored as: itself, or codes and scales where NF4 is used.

    Args:
        name: canonical name.
        dense: its value, on any device; quantised there.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf == "weight" and isinstance(owner, FrozenLinear) and owner.nf4:
        codes, absmax = quantize(dense)
        yield name, codes
        yield f"{path}.absmax", absmax
    else:
        yield name, dense


def load_base(module: Qwen2, weights: WeightSource, device: torch.device) -> int:
    """Fill every frozen parameter of a module that `add_lora` prepared, one tensor at a time.

    Names and shapes must have been checked. Parameters on the meta device are replaced. Returns
    the bytes read.
    """
    parameters = dict(module.named_parameters())
    total = 0
    for param in schema(module.spec):
        host = weights.read(param.name)
        total += host.nbytes
        for name, value in stored_tensors(module, param.name, as_tensor(host).to(device)):
            _fill(module, name, parameters[name], value)
    return total


def load_factors(module: Qwen2, factors: Iterator[tuple[str, Tensor]]) -> None:
    """Fill adapter parameters, e.g. from `initial_factors`; those on the meta device are replaced
    on the device of the embedding."""
    parameters = dict(module.named_parameters())
    device = module.model.embed_tokens.weight.device
    for name, value in factors:
        _fill(module, name, parameters[name], value.to(device))


def export_factors(module: nn.Module) -> Iterator[tuple[str, HostTensor]]:
    """All adapter parameters, float32, in model order; collective where they are sharded."""
    for path, layer in _adapted(module):
        for name, factor in zip(factor_names(path), (layer.lora_A, layer.lora_B), strict=True):
            yield name, as_host(whole(factor.weight))


def export_merged(module: Qwen2) -> Iterator[tuple[str, HostTensor]]:
    """All schema parameters with the adapters merged in, in schema order.

    Adapted matrices are float32, the others as stored (NF4 dequantised to the compute dtype).
    Collective where parameters are sharded.
    """
    for param in schema(module.spec):
        path, _, leaf = param.name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf == "weight" and isinstance(owner, FrozenLinear):
            yield param.name, as_host(owner.dense_weight())
        else:
            yield param.name, as_host(whole(getattr(owner, leaf)))


def _adapted(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for path, layer in module.named_modules():
        if isinstance(layer, LoRALinear):
            yield path, layer


def _fill(module: nn.Module, name: str, parameter: nn.Parameter, value: Tensor) -> None:
    if not parameter.is_meta:
        with torch.no_grad():
            parameter.copy_(value)
        return
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    fresh = nn.Parameter(value.to(parameter.dtype, copy=True), parameter.requires_grad)
    setattr(owner, leaf, fresh)
