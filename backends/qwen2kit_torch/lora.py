"""LoRA (arXiv 2106.09685) on the torch model: frozen weights, trainable low-rank updates.

`add_lora` replaces the decoder's linear layers. Parameters keep their canonical names; a layer
with an adapter has two more, ``lora_A.weight`` ``[rank, in]`` and ``lora_B.weight``
``[out, rank]`` (float32, as PEFT names and shapes them), and a matrix kept in NF4 has its codes as
``weight`` and its scales as ``absmax``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2kit.adapters.lora import lora_scale
from qwen2kit.backend.plan import LoRAPlan
from qwen2kit.errors import BackendError
from qwen2kit.spec.schema import schema
from qwen2kit_torch.linear import Linear
from qwen2kit_torch.lora_nf4 import dequantize, nf4_linear, packed_sizes, quantize
from qwen2kit_torch.model import Qwen2
from qwen2kit_torch.train.parameters import whole


class FrozenLinear(Linear):
    """A `Linear` that never trains; its matrix is dense or in NF4.

    Products are computed in ``dtype``. Outside autocast the result has the input's dtype.

    Args:
        base: the layer to replace; may be on the meta device.
        dtype: of products, and of the stored bias and dense matrix.
        nf4: keep the matrix in NF4.

    Raises:
        BackendError: the matrix does not divide into NF4 blocks.
    """

    absmax: Tensor

    def __init__(self, base: Linear, *, dtype: torch.dtype, nf4: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dtype = dtype
        self.nf4 = nf4
        self._packed = None
        if nf4:
            codes, absmax = _quantized(base.weight)
            self.weight, self.absmax = _frozen(codes), _frozen(absmax)
        else:
            self.weight = _frozen(base.weight.detach().to(dtype))
        bias = None if base.bias is None else _frozen(base.bias.detach().to(dtype))
        self.register_parameter("bias", bias)

    @property
    def shape(self) -> tuple[int, int]:
        """``(outputs, inputs)``."""
        return self.out_features, self.in_features

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``[..., inputs] -> [..., outputs]``, see `Linear.product`."""
        narrow = x.to(self.dtype)
        if self.nf4:
            out = nf4_linear(narrow, self.weight, self.absmax, bias, self.out_features)
        else:
            out = F.linear(narrow, self.weight, bias)
        return out if torch.is_autocast_enabled(x.device.type) else out.to(x.dtype)

    def pack(self) -> None:
        """Nothing: training goes on with the plain weight."""

    def dense_weight(self) -> Tensor:
        """The matrix ``[outputs, inputs]`` in ``dtype``; collective where it is sharded."""
        if self.nf4:
            return dequantize(whole(self.weight), whole(self.absmax), self.shape, self.dtype)
        return whole(self.weight)


class LoRALinear(FrozenLinear):
    """``base(x) + scale * B(A(dropout(x)))``.

    Args:
        base, dtype, nf4: as for `FrozenLinear`.
        plan: rank, scale and dropout.
    """

    def __init__(self, base: Linear, *, dtype: torch.dtype, nf4: bool, plan: LoRAPlan) -> None:
        super().__init__(base, dtype=dtype, nf4=nf4)
        device = base.weight.device
        outputs, inputs = self.shape
        self.scale = lora_scale(plan.rank, plan.alpha, rslora=plan.rslora)
        self.dropout = plan.dropout
        self.lora_A = Factor(plan.rank, inputs, device)
        self.lora_B = Factor(outputs, plan.rank, device)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``[..., inputs] -> [..., outputs]``, see `Linear.product`."""
        out = super().product(x, bias)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        update: Tensor = self.lora_B(self.lora_A(x))
        return out + update * self.scale

    def dense_weight(self) -> Tensor:
        """The merged matrix ``[outputs, inputs]``, float32; collective where it is sharded."""
        update = whole(self.lora_B.weight) @ whole(self.lora_A.weight)
        return super().dense_weight().float() + update * self.scale


class Factor(nn.Module):
    """One of the two small matrices: trainable, float32, uninitialised."""

    def __init__(self, outputs: int, inputs: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs] -> [..., outputs]`` in the dtype of ``x``."""
        return F.linear(x, self.weight.to(x.dtype))


def add_lora(module: Qwen2, plan: LoRAPlan, *, dtype: torch.dtype) -> None:
    """Freeze ``module`` and give the layers named in ``plan.targets`` trainable adapters.

    The decoder's matrices and biases (and an untied head) are stored in ``dtype``, the matrices
    in NF4 if the plan says so; embedding and norms stay as they are. To be called once, on
    parameters that are on the meta device, uninitialised or loaded. Afterwards the adapters must
    be filled from `lora_weights.initial_factors`.

    Args:
        dtype: of the products; bfloat16 where the forward pass runs under autocast.

    Raises:
        BackendError: no layer has one of the names, or a matrix does not divide into NF4 blocks.
    """
    module.requires_grad_(False)
    adapted = 0
    for param in schema(module.spec):
        if param.kind not in ("linear", "head"):
            continue
        owner, _, name = param.name.removesuffix(".weight").rpartition(".")
        parent = module.get_submodule(owner)
        nf4 = plan.quantize == "nf4" and param.kind == "linear"
        if param.kind == "linear" and name in plan.targets:
            layer: nn.Module = LoRALinear(getattr(parent, name), dtype=dtype, nf4=nf4, plan=plan)
            adapted += 1
        else:
            layer = FrozenLinear(getattr(parent, name), dtype=dtype, nf4=nf4)
        setattr(parent, name, layer)
    if not adapted:
        raise BackendError(f"no layer is named {' or '.join(plan.targets) or '(nothing)'}")
    module.eval()


@contextmanager
def dropout(module: nn.Module, plan: LoRAPlan, *, step: int, rank: int = 0) -> Iterator[None]:
    """Adapter dropout is on inside the block, and drawn as a function of seed, step and rank.

    Torch's generators are seeded anew at the start (and restored at the end), so that a resumed
    run draws the same masks without any generator state in its checkpoints.
    """
    if not plan.dropout:
        yield
        return
    device = next(module.parameters()).device
    used = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=used):
        key = np.random.SeedSequence([plan.seed, step, rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(key))
        module.train()
        try:
            yield
        finally:
            module.eval()


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    if not weight.is_meta:
        return quantize(weight)
    codes, blocks = packed_sizes(weight.shape)
    return (
        torch.empty(codes, dtype=torch.uint8, device="meta"),
        torch.empty(blocks, device="meta"),
    )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
