"""A model and an adapter as one: merged while it is read, tensor by tensor, in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen2kit.adapters.base_mark import is_other_model
from qwen2kit.adapters.directory import find_adapter, is_adapter, open_adapter
from qwen2kit.adapters.lora import WEIGHT, Adapter, LowRank
from qwen2kit.errors import WeightError
from qwen2kit.weights.checkpoint import Checkpoint, open_checkpoint
from qwen2kit.weights.locate import locate
from qwen2kit.weights.source import AffineTensor, TensorInfo, WeightSource
from qwen2kit.weights.tensor import HostTensor, from_numpy


class AdaptedSource:
    """A WeightSource whose adapted matrices read as ``W + scale * B @ A``, float32.

    A backend that applies adapters beside the weights takes `base` and `update` instead.

    Attributes:
        base: the model's own weights.
    """

    def __init__(self, base: WeightSource, adapter: Adapter) -> None:
        self.base = base
        self._updates = {f"{path}{WEIGHT}": update for path, update in adapter.modules.items()}

    def names(self) -> tuple[str, ...]:
        return self.base.names()

    def info(self, name: str) -> TensorInfo:
        info = self.base.info(name)
        return TensorInfo("float32", info.shape) if name in self._updates else info

    def read(self, name: str) -> HostTensor:
        weight = self.base.read(name)
        update = self._updates.get(name)
        if update is None:
            return weight
        merged = update.delta()
        merged += weight.float32()
        return from_numpy(merged)

    def affine(self, name: str) -> AffineTensor | None:
        return None if name in self._updates else self.base.affine(name)

    def update(self, name: str) -> LowRank | None:
        """The update of the matrix ``name``, or None if it has none."""
        return self._updates.get(name)


def with_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """``checkpoint`` as ``adapter`` changes it, with a note if it was trained on another model.

    Raises:
        WeightError: the adapter belongs to another model, or the checkpoint has one already.
    """
    if checkpoint.adapter is not None:
        raise WeightError(
            f"{checkpoint.adapter}: is an adapter itself; merge it first: "
            "qwen2kit convert BASE OUT --adapter ADAPTER"
        )
    adapter.check_fits(checkpoint.spec)
    weights = AdaptedSource(checkpoint.weights, adapter)
    notes = checkpoint.notes
    if is_other_model(adapter.base_mark, checkpoint.weights):
        made_on = adapter.base_model or "another one"
        notes += (
            f"the adapter {adapter.path} was not trained on {checkpoint.path} but on {made_on}"
            " (the weights of the final norm differ); what it was trained for may be lost",
        )
    return replace(checkpoint, weights=weights, adapter=adapter.path, notes=notes)


def open_model(model: str, adapter: str | None = None) -> Checkpoint:
    """Locate and open a model, with an adapter if one is named.

    Args:
        model: as for `locate`; an adapter directory stands for its base model and itself.
        adapter: as for `find_adapter`.

    Raises:
        Qwen2KitError: of the kind that says what is wrong.
    """
    checkpoint = open_checkpoint(locate(model))
    return checkpoint if adapter is None else with_adapter(checkpoint, find_adapter(adapter))


def open_on_base(directory: Path) -> Checkpoint:
    """An adapter directory together with the base model that its config names.

    Raises:
        WeightError: it names none, or that one is not here; the message says what to type instead.
    """
    adapter = open_adapter(directory)
    remedy = f"name the base model yourself: BASE --adapter {directory}"
    if adapter.base_model is None:
        raise WeightError(f"{directory}: does not say which model it belongs to; {remedy}")
    try:
        base = locate(adapter.base_model)
    except WeightError as error:
        raise WeightError(f"{directory}: its base model is not here: {error}; {remedy}") from error
    if is_adapter(base):
        raise WeightError(f"{directory}: its base {base} is an adapter itself; merge that first")
    return with_adapter(open_checkpoint(base), adapter)
