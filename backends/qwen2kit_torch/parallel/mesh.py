"""The processes of a training run as named groups: one DeviceMesh per view of them."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen2kit.plan.degrees import Degrees


class Mesh:
    """Groups of processes along the axes of `Degrees`, in its order (``tp`` varies fastest).

    ``fsdp`` is ``dp_shard`` times ``cp``: the processes among which one copy of the optimizer
    state is divided. ``data`` is ``dp_replicate`` times ``dp_shard``: those that read different
    rows. ``loss`` is ``pp`` times ``data`` times ``cp``: those whose losses add up. Experts will
    be spread over ``fsdp``.

    Args:
        degrees: complete, with the running world as product.
        device_type: ``cuda`` or ``cpu``.
    """

    def __init__(self, degrees: Degrees, device_type: str) -> None:
        self.degrees = degrees
        self._views: dict[str, DeviceMesh] = {}
        if degrees.world == 1:
            return
        d = degrees
        for axes in (
            {"pp": d.pp, "dp_replicate": d.dp_replicate, "fsdp": d.sharded, "tp": d.tp},
            {"_pp": d.pp, "data": d.data, "cp": d.cp, "_tp": d.tp},
            {"loss": d.pp * d.data * d.cp, "_tp": d.tp},
        ):
            names = tuple(axes)
            view = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=names)
            self._views |= {name: view for name in names if not name.startswith("_")}

    def __getitem__(self, axes: str | tuple[str, ...]) -> DeviceMesh:
        """The submesh of one axis, or of several of the same view."""
        first = axes if isinstance(axes, str) else axes[0]
        return self._views[first][axes]

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group of ``axis`` through this process; None if it is alone on it."""
        return self[axis].get_group() if self.size(axis) > 1 else None

    def size(self, axis: str) -> int:
        """Number of processes along ``axis``."""
        return self[axis].size() if self._views else 1

    def rank(self, axis: str) -> int:
        """Place of this process along ``axis``."""
        return self[axis].get_local_rank() if self._views else 0
