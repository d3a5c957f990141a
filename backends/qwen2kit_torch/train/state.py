"""Weights and AdamW moments on disk: two safetensors files under canonical names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen2kit.errors import WeightError
from qwen2kit.weights.safetensors_read import SafetensorsFile
from qwen2kit.weights.safetensors_write import SafetensorsFileWriter
from qwen2kit.weights.source import TensorInfo
from qwen2kit.weights.tensor import HostTensor, from_numpy

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")

Parameters = Mapping[str, torch.nn.Parameter]


def save_state(directory: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> None:
    """Write ``model.safetensors`` and ``optimizer.safetensors``, tensor by tensor.

    Raises:
        OSError: the disk is full or not writable.
    """
    _write(directory / MODEL_FILE, {name: p.detach() for name, p in parameters.items()})
    _write(directory / OPTIMIZER_FILE, dict(_optimizer_tensors(parameters, optimizer)))


def restore_state(
    directory: Path, parameters: Parameters, optimizer: torch.optim.Optimizer
) -> None:
    """Read what `save_state` wrote into ``parameters`` and ``optimizer``.

    Raises:
        WeightError: a file is missing or damaged, or belongs to another model.
    """
    model, state = _open(directory / MODEL_FILE), _open(directory / OPTIMIZER_FILE)
    _check(model, {name: p.shape for name, p in parameters.items()})
    started = STEP in state.names()
    if started:
        _check(state, {STEP: ()} | _moment_shapes(parameters))
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(_tensor(model, name))
        if started:
            like = parameter.detach()
            moments = {m: _tensor(state, f"{m}.{name}").to(like.device) for m in MOMENTS}
            optimizer.state[parameter] = {STEP: _step(state, like), **moments}
        else:
            optimizer.state.pop(parameter, None)


def _optimizer_tensors(
    parameters: Parameters, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        yield STEP, state[STEP]
        for moment in MOMENTS:
            yield f"{moment}.{name}", state[moment]


def _moment_shapes(parameters: Parameters) -> dict[str, tuple[int, ...]]:
    return {f"{m}.{name}": tuple(p.shape) for name, p in parameters.items() for m in MOMENTS}


def _step(state: SafetensorsFile, like: Tensor) -> Tensor:
    # Fused AdamW keeps the count beside the parameter.
    return _tensor(state, STEP).to(like.device)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plan = [(name, TensorInfo("float32", tuple(t.shape))) for name, t in tensors.items()]
    with SafetensorsFileWriter(path, plan, metadata={"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, _host(tensor))


def _host(tensor: Tensor) -> HostTensor:
    return from_numpy(tensor.to("cpu", torch.float32).numpy())


def _open(path: Path) -> SafetensorsFile:
    if not path.is_file():
        raise WeightError(f"{path} is missing: the checkpoint is incomplete")
    return SafetensorsFile(path)


def _check(file: SafetensorsFile, expected: Mapping[str, tuple[int, ...] | torch.Size]) -> None:
    present = {name: file.info(name) for name in file.names()}
    wanted = {name: TensorInfo("float32", tuple(shape)) for name, shape in expected.items()}
    wrong = sorted(n for n in present.keys() | wanted.keys() if present.get(n) != wanted.get(n))
    if wrong:
        raise WeightError(
            f"{file.path} is of another model: {', '.join(wrong[:3])} missing or different"
        )


def _tensor(file: SafetensorsFile, name: str) -> Tensor:
    # A copy: the file is mapped read-only and may be deleted while training goes on.
    return torch.from_numpy(np.array(file.read(name).raw()))
