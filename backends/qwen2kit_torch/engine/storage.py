"""Keys and values of independent sequences, allocated once.

Shapes: S slots, K kv heads, P positions (the capacity), C head_dim. Position ``p`` of a sequence
is always at index ``p``, so that emptying or cutting back a slot moves nothing. Memory starts
uninitialised: nothing reads beyond what was written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwen2kit.backend.slots import ANCHORED_KEYS
from qwen2kit.errors import BackendError, WeightError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.weights.tensor import HostTensor
from qwen2kit_torch.devices import free_memory
from qwen2kit_torch.weights import as_host, as_tensor

# What passes over the slots need besides: activations, logits, the allocator's own waste.
_HEADROOM = 0.15


class Storage:
    """Room for ``count`` slots, fewer where memory does not hold them.

    Args:
        spec: the model.
        count: slots asked for.
        capacity: P.
        device: where it lives.
        dtype: compute dtype of the model.
        anchored: whether keys stand less their bias (`Qwen2.anchor_keys`); saved, they have
            another name, since they mix with others unnoticed.

    Attributes:
        count: S.
        capacity: P.
        layers: keys and values of every layer, each ``[S, K, P, C]``.

    Raises:
        BackendError: not even one slot fits.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        count: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        anchored: bool = False,
    ) -> None:
        self._names = (ANCHORED_KEYS if anchored else "keys", "values")
        one = slot_bytes(spec, capacity, dtype)
        room = int(free_memory(device) * (1 - _HEADROOM))
        if room < one:
            raise BackendError(
                f"a slot of {capacity} tokens takes {one / 1e9:.1f} GB and {room / 1e9:.1f} GB "
                f"are free on {device}; ask for shorter sequences (serve: --context)"
            )
        self.count = min(count, room // one)
        self.capacity = capacity
        shape = (self.count, spec.num_key_value_heads, capacity, spec.head_dim)
        self.layers = [
            (
                torch.empty(shape, device=device, dtype=dtype),
                torch.empty(shape, device=device, dtype=dtype),
            )
            for _ in range(spec.num_hidden_layers)
        ]

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first ``length`` positions of ``target`` equal to those of ``source``."""
        for pair in self.layers:
            for part in pair:
                part[target, :, :length] = part[source, :, :length]

    def export(self, slot: int, length: int) -> Iterator[tuple[str, HostTensor]]:
        """``layers.{i}.keys`` (`ANCHORED_KEYS` where they are) and ``.values`` of the first
        ``length`` positions, ``[K, n, C]``."""
        for index, pair in enumerate(self.layers):
            for name, part in zip(self._names, pair, strict=True):
                yield f"layers.{index}.{name}", as_host(part[slot, :, :length])

    def restore(self, slot: int, tensors: Iterator[tuple[str, HostTensor]]) -> None:
        """Fill a slot from what `export` gave.

        Raises:
            WeightError: a tensor is missing, unknown, too long or of another shape or dtype.
        """
        places = {
            f"layers.{index}.{name}": part[slot]
            for index, pair in enumerate(self.layers)
            for name, part in zip(self._names, pair, strict=True)
        }
        for name, host in tensors:
            place, value = places.pop(name, None), as_tensor(host)
            if place is None or not _fits(place, value):
                raise WeightError(
                    f"the saved {name} {host.dtype} {list(host.shape)} does not fit this model's "
                    "cache; it was made by another model, dtype or a longer context"
                )
            place[:, : value.shape[1]] = value.to(place.device)
        if places:
            raise WeightError(f"the saved cache lacks {next(iter(places))}; make it anew")


def slot_bytes(spec: ModelSpec, capacity: int, dtype: torch.dtype) -> int:
    """Bytes of one slot of ``capacity`` tokens."""
    width = spec.num_key_value_heads * spec.head_dim * dtype.itemsize
    return 2 * spec.num_hidden_layers * width * capacity


def _fits(place: Tensor, value: Tensor) -> bool:
    return (
        value.dim() == 3
        and value.dtype == place.dtype
        and (value.shape[0], value.shape[2]) == (place.shape[0], place.shape[2])
        and value.shape[1] <= place.shape[1]
    )
