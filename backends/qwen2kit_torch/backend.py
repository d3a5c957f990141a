"""TorchBackend: what the entry point ``qwen2kit.backends`` names ``torch``."""

from __future__ import annotations

import torch

from qwen2kit.backend.meter import DeviceMeter
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.processes import Processes
from qwen2kit.backend.protocol import PROTOCOL_VERSION, Capabilities, CompiledModel, Device
from qwen2kit.spec.model import ModelSpec
from qwen2kit_torch.compiled import TorchModel
from qwen2kit_torch.devices import DTYPES, devices
from qwen2kit_torch.quantized import BITS


class TorchBackend:
    """PyTorch on CUDA, MPS or CPU, for inference and training of dense models."""

    name = "torch"
    protocol_version = PROTOCOL_VERSION

    def capabilities(self) -> Capabilities:
        """Dense models with full or sliding-window attention; quantised weights are
        expanded unless the plan asks for ``weight_bits``."""
        return Capabilities(
            dtypes=tuple(DTYPES),
            weight_bits=BITS,
            trains=True,
            distributed=True,
            sliding_window=True,
        )

    def devices(self) -> tuple[Device, ...]:
        """CUDA devices, then MPS, then the CPU."""
        return devices()

    def versions(self) -> dict[str, str]:
        """The framework's version and, where present, CUDA's."""
        found = {"torch": str(torch.__version__)}
        if torch.version.cuda is not None:
            found["cuda"] = torch.version.cuda
        return found

    def compile(self, spec: ModelSpec, plan: ExecutionPlan) -> CompiledModel:
        """Build the model on the meta device; with ``plan.train``, a trainable one.

        Raises:
            BackendError: no such device, a mixture-of-experts spec, or ``max_seq_len`` out of
                range.
        """
        if plan.train is None:
            return TorchModel(spec, plan)
        from qwen2kit_torch.train.model import TorchTrainableModel

        return TorchTrainableModel(spec, plan)

    def meter(self, plan: ExecutionPlan) -> DeviceMeter:
        """Measures the device that ``plan`` names; see `MeteredBackend`."""
        from qwen2kit_torch.meter import TorchMeter

        return TorchMeter(plan)

    def processes(self, plan: ExecutionPlan) -> Processes:
        """Join the other processes that ``torchrun`` started."""
        from qwen2kit_torch.parallel.processes import connect

        return connect(plan.device)

    def launch_command(self, processes: int, *, max_restarts: int = 0) -> list[str]:
        """``torchrun`` on this machine, less its own report of failures."""
        from qwen2kit_torch.parallel.launch import launch_command

        return launch_command(processes, max_restarts=max_restarts)

    def lost_process(self, error: Exception) -> bool:
        """Whether a collective failed because its peer is gone."""
        from qwen2kit_torch.parallel.processes import lost_process

        return lost_process(error)
