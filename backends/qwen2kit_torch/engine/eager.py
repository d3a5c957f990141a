"""Slots on any device: every pass runs the network as it is, piece by piece in attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count as numbers

import torch
from torch import Tensor

from qwen2kit.backend.slots import Feed
from qwen2kit.weights.tensor import HostTensor
from qwen2kit_torch.attention import Attend
from qwen2kit_torch.engine.device_logits import logits_on_device
from qwen2kit_torch.engine.logits import DeviceLogits
from qwen2kit_torch.engine.memory import bounded_by_memory
from qwen2kit_torch.engine.pieces import (
    TOKENS_PER_PASS,
    PackedAttend,
    PackedCache,
    Piece,
    passes,
    positions_of,
)
from qwen2kit_torch.engine.storage import Storage
from qwen2kit_torch.model import Qwen2


class EagerSlots:
    """Implements `qwen2kit.backend.slots.PersistentSlots`.

    Args:
        model: loaded.
        count: slots asked for.
        capacity: tokens of each.

    Raises:
        BackendError: not even one slot fits into memory.
    """

    def __init__(self, model: Qwen2, *, count: int, capacity: int) -> None:
        weight = model.model.embed_tokens.weight
        self._model, self._device = model, weight.device
        with torch.inference_mode():
            self._storage = Storage(
                model.spec,
                count=count,
                capacity=capacity,
                device=weight.device,
                dtype=weight.dtype,
                anchored=model.anchored,
            )
        self.count, self.capacity = self._storage.count, capacity

    @bounded_by_memory
    @torch.inference_mode()
    def feed(self, feeds: Sequence[Feed]) -> DeviceLogits:
        """Append tokens to slots; see the protocol.

        The first single tokens make the weights be packed: it costs some ten decode steps, which
        scoring and loading are spared.
        """
        if all(len(feed.tokens) == 1 for feed in feeds):
            self._model.pack()
        hidden = [self.hidden(pieces) for pieces in passes(feeds, TOKENS_PER_PASS)]
        return logits_on_device(self._model.head(torch.cat(hidden)))

    def hidden(self, pieces: Sequence[Piece]) -> Tensor:
        """One pass; final hidden states ``[N, D]`` of the wanted positions."""
        tokens = torch.tensor([[token for piece in pieces for token in piece.tokens]])
        visible: dict[int | None, Attend] = {
            window: PackedAttend(pieces, window, self._device)
            for window in set(self._model.windows)
        }
        hidden_1TD = self._model.forward_hidden(
            tokens.to(self._device),
            positions=positions_of(pieces, self._device),
            cache=PackedCache(self._storage, pieces),
            visible=visible,
        )
        return hidden_1TD[0, _wanted(pieces, self._device)]

    def run_greedy(
        self, feeds: Sequence[Feed], limit: int | None, most: int | None = None
    ) -> Iterator[list[int]]:
        """Feed one token per slot and go on with the most likely ids; see the protocol."""
        for _ in numbers() if most is None else range(most):
            ids = self.feed(feeds).greedy(limit)
            yield ids
            if any(feed.start + 1 >= self.capacity for feed in feeds):
                return
            feeds = [
                replace(feed, start=feed.start + 1, tokens=(max(token, 0),))
                for feed, token in zip(feeds, ids, strict=True)
            ]

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first ``length`` positions of ``target`` equal to those of ``source``."""
        self._storage.copy(source, target, length)

    def clear(self, slot: int) -> None:
        """Nothing to do: what lies beyond a slot's tokens is not read."""

    def export(self, slot: int, length: int) -> Iterator[tuple[str, HostTensor]]:
        """Keys and values of the first ``length`` positions; see the protocol."""
        return self._storage.export(slot, length)

    @torch.inference_mode()
    def restore(self, slot: int, tensors: Iterator[tuple[str, HostTensor]]) -> None:
        """Fill a slot from what `export` gave; raises WeightError if it does not fit."""
        self._storage.restore(slot, tensors)

    def close(self) -> None:
        """Give the memory back."""
        self._storage.layers.clear()


def _wanted(pieces: Sequence[Piece], device: torch.device) -> Tensor:
    rows: list[int] = []
    done = 0
    for piece in pieces:
        done += len(piece.tokens)
        rows += range(done - piece.wanted, done)
    return torch.tensor(rows, device=device, dtype=torch.int64)
