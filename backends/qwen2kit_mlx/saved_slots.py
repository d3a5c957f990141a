"""Whether tensors that claim to be a saved slot are one of this model's."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from qwen2kit.backend.slots import ANCHORED_KEYS
from qwen2kit.errors import WeightError
from qwen2kit.weights.tensor import HostTensor
from qwen2kit_mlx.host_tensor import to_device, to_host
from qwen2kit_mlx.slot_store import SlotStore


def saved_name(layer: int, part: str, anchored: bool) -> str:
    """The name of a part of a saved slot.

    Args:
        layer: which.
        part: its name in `Columns.export`.
        anchored: whether keys stand less their bias, which they are called otherwise for.
    """
    return f"layers.{layer}.{part.replace('keys', ANCHORED_KEYS) if anchored else part}"


def fitting(
    store: SlotStore, given: Mapping[str, HostTensor], capacity: int, anchored: bool
) -> list[dict[str, mx.array]]:
    """The parts of every layer on the device, for `Columns.restore`.

    Args:
        store: what they shall go into.
        given: tensors by name, as `PersistentSlots.export` names them.
        capacity: most tokens a slot holds.
        anchored: as for `saved_name`.

    Raises:
        WeightError: names, shapes or dtypes are not those of the store.
    """
    blank = [layer.export(0, 0) for layer in store.layers]
    names = [
        [saved_name(index, name, anchored) for name in parts] for index, parts in enumerate(blank)
    ]
    if set(given) != {name for layer in names for name in layer}:
        raise WeightError(
            f"the saved prompt does not hold the keys and values of {len(blank)} layers in the "
            "form this model keeps them (another dtype or other cache bits); read the prompt again"
        )
    length = given[names[0][0]].shape[1]
    if not 1 <= length <= capacity:
        raise WeightError(f"the saved prompt has {length} tokens, a slot here holds {capacity}")
    for layer, parts in zip(names, blank, strict=True):
        for name, part in zip(layer, parts.values(), strict=True):
            expected = (part.shape[0], length, part.shape[2])
            dtype = to_host(part).dtype
            if given[name].shape != expected or given[name].dtype != dtype:
                raise WeightError(
                    f"{name} of the saved prompt is {given[name].dtype} {list(given[name].shape)}, "
                    f"not {dtype} {list(expected)}; read the prompt again"
                )
    return [
        {name: to_device(given[full]) for name, full in zip(parts, layer, strict=True)}
        for layer, parts in zip(names, blank, strict=True)
    ]
