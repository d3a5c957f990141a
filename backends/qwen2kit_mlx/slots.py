"""Key/value slots on an MLX device, and forward passes over them.

Shape suffixes: B rows, T tokens per row, X tokens of a pass, N wanted positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from qwen2kit.backend.slots import Feed
from qwen2kit.errors import BackendError
from qwen2kit.weights.tensor import HostTensor
from qwen2kit_mlx.attention import Attend, Block, Prompt, Segments
from qwen2kit_mlx.device_logits import DeviceLogits, best_ids
from qwen2kit_mlx.host_tensor import to_host
from qwen2kit_mlx.memory import Wired, bounded_by_memory
from qwen2kit_mlx.model import Decoder
from qwen2kit_mlx.passes import Piece, passes
from qwen2kit_mlx.saved_slots import fitting, saved_name
from qwen2kit_mlx.slot_store import SlotStore

SMALLER = "fewer slots or a shorter context, --cache-bits 8 or 4, or a model of fewer bits"
CLEAR_EVERY = 256  # greedy steps between returns of unused device buffers


class MLXSlots:
    """See `qwen2kit.backend.slots.PersistentSlots`.

    Slots are rows of one store. Which row a slot has may change: rows that decode together are
    made neighbours, so that a pass reads them in place.
    """

    def __init__(
        self,
        decoder: Decoder,
        count: int,
        capacity: int,
        device: mx.Device,
        bits: int | None = None,
    ) -> None:
        self.count, self.capacity = count, capacity
        self._decoder, self._device = decoder, device
        self._anchored = decoder.heads.anchors is not None
        with mx.stream(device):
            self._store = SlotStore(decoder.spec, count, decoder.dtype, bits, capacity)
        self._row = list(range(count))
        self._held: list[list[int]] = [[] for _ in range(count)]  # kept where the store forgets
        self._wired = Wired().__enter__()

    @bounded_by_memory(SMALLER)
    def feed(self, feeds: Sequence[Feed]) -> DeviceLogits:
        """See `Slots.feed`. What it gives is computed when it is read."""
        with mx.stream(self._device):
            feeds = [self._complete(feed) for feed in feeds]
            parts: list[mx.array] = []
            owners: list[int] = []
            for pieces in passes(feeds):
                hidden_XD, found = self._run(pieces)
                places = [place for own in found for place in own[1]]
                owners += [own[0] for own in found for _ in own[1]]
                if places != list(range(len(hidden_XD))):
                    hidden_XD = hidden_XD[mx.array(places, dtype=mx.int32)]
                parts.append(hidden_XD)
            hidden_ND = parts[0] if len(parts) == 1 else mx.concatenate(parts)
            order = np.argsort(owners, kind="stable")
            if not np.array_equal(order, np.arange(len(order))):
                hidden_ND = hidden_ND[mx.array(order)]
            if not owners:
                mx.eval(self._store.arrays())
            return DeviceLogits(self._decoder, hidden_ND, self._device)

    def run_greedy(
        self, feeds: Sequence[Feed], limit: int | None, most: int | None = None
    ) -> Iterator[list[int]]:
        """See `Slots.run_greedy`; one step runs ahead where the device computes on its own."""
        if self._store.forgets:
            self._recall(feeds)
        with mx.stream(self._device):
            order = self._arrange([feed.slot for feed in feeds])
            tokens_B = mx.array([feeds[i].tokens[0] for i in order], dtype=mx.int32)
        first = self._row[feeds[order[0]].slot]
        starts = [feeds[i].start for i in order]
        back = np.argsort(order)
        steps = self.capacity - max(starts)
        steps = steps if most is None else min(steps, most)
        ahead = 1 if self._decoder.kernels.lazy else 0
        running: list[mx.array] = []
        for step in range(steps + ahead):
            with bounded_by_memory(SMALLER), mx.stream(self._device):
                if step < steps:
                    block = self._block(first, [start + step for start in starts], 1)
                    tokens_B = self._greedy_step(block, tokens_B, limit)
                    running.append(tokens_B)
                if step < ahead:
                    continue
                ids = np.asarray(running.pop(0))[back].tolist()
                if step % CLEAR_EVERY == CLEAR_EVERY - 1:
                    mx.clear_cache()
            if self._store.forgets:
                for feed, token in zip(feeds, ids, strict=True):
                    self._held[feed.slot].append(token)
            yield ids

    @bounded_by_memory(SMALLER)
    def copy(self, source: int, target: int, length: int) -> None:
        """See `Slots.copy`."""
        with mx.stream(self._device):
            self._store.copy(self._row[source], self._row[target], length)
            self._held[target] = self._held[source][:length]

    def clear(self, slot: int) -> None:
        """See `Slots.clear`: rows of different length are read up to the end of the longest, and a
        masked NaN would still spread (0 * NaN)."""
        with mx.stream(self._device):
            self._store.clear(self._row[slot])
            self._held[slot] = []

    def export(self, slot: int, length: int) -> Iterator[tuple[str, HostTensor]]:
        """See `PersistentSlots.export`.

        Raises:
            BackendError: the slots are so long that layers with a sliding window forget.
        """
        self._refuse_if_forgetful()
        for index, layer in enumerate(self._store.layers):
            with mx.stream(self._device):
                parts = layer.export(self._row[slot], length)
                tensors = {name: to_host(mx.contiguous(part)) for name, part in parts.items()}
            for name, tensor in tensors.items():
                yield saved_name(index, name, self._anchored), tensor

    def restore(self, slot: int, tensors: Iterator[tuple[str, HostTensor]]) -> None:
        """See `PersistentSlots.restore`; also raises what `export` does."""
        self._refuse_if_forgetful()
        given = dict(tensors)
        with mx.stream(self._device):
            parts = fitting(self._store, given, self.capacity, self._anchored)
            for window in set(self._store.windows):
                self._store.reserve(window, parts[0]["keys"].shape[1])
            for layer, part in zip(self._store.layers, parts, strict=True):
                layer.restore(self._row[slot], part)
            mx.eval(self._store.arrays())

    def close(self) -> None:
        """See `Slots.close`."""
        self._store.drop()
        self._wired.__exit__(None, None, None)
        mx.clear_cache()

    def _refuse_if_forgetful(self) -> None:
        if self._store.forgets:
            raise BackendError(
                "slots this long forget what lies behind the model's sliding window and cannot be "
                "saved; use shorter ones"
            )

    def _complete(self, feed: Feed) -> Feed:
        """``feed``, or one that reads the slot's tokens again because layers have forgotten what
        it needs."""
        if not self._store.forgets:
            return feed
        held, row = self._held[feed.slot], self._row[feed.slot]
        before, held[feed.start :] = held[: feed.start], feed.tokens
        if self._store.holds(row, feed.start):
            return feed
        self._store.forget(row)
        return Feed(feed.slot, 0, (*before, *feed.tokens), feed.wanted)

    def _recall(self, feeds: Sequence[Feed]) -> None:
        """Make slots hold what is before ``feeds``, of one token each, and note those tokens."""
        for feed in feeds:
            held = self._held[feed.slot]
            if feed.start and not self._store.holds(self._row[feed.slot], feed.start):
                self.feed([Feed(feed.slot, 0, tuple(held[: feed.start]), 0)])
            if not feed.start:
                self._store.forget(self._row[feed.slot])
            held[feed.start :] = feed.tokens

    def _arrange(self, slots: Sequence[int]) -> list[int]:
        """Indices of ``slots`` by row; their rows are neighbours afterwards."""
        rows = sorted(self._row[slot] for slot in slots)
        if rows[-1] - rows[0] >= len(rows):
            others = [row for row in range(self.count) if row not in rows]
            order = [*rows, *others]
            self._store.permute(order)
            place = {row: new for new, row in enumerate(order)}
            self._row = [place[row] for row in self._row]
        return sorted(range(len(slots)), key=lambda i: self._row[slots[i]])

    def _greedy_step(self, block: Block, tokens_B: mx.array, limit: int | None) -> mx.array:
        hidden_BD = self._decoder(tokens_B[:, None], block)
        ids_B = best_ids(self._decoder.logits(hidden_BD), limit)
        mx.async_eval(ids_B)  # type: ignore[no-untyped-call]
        return ids_B

    def _run(self, pieces: Sequence[Piece]) -> tuple[mx.array, list[tuple[int, range]]]:
        """One pass: its residual stream ``[X, D]``; where each feed's wanted positions are."""
        short = [piece for piece in pieces if piece.short]
        short = [short[i] for i in self._arrange([p.slot for p in short])] if short else []
        parts: list[tuple[int, int, Attend]] = []
        tokens: list[int] = []
        found: list[tuple[int, range]] = []
        if short:
            count = max(len(piece.tokens) for piece in short)
            first = self._row[short[0].slot]
            block = self._block(first, [piece.start for piece in short], count)
            parts.append((len(short), count, block))
        for piece in (*short, *(piece for piece in pieces if not piece.short)):
            end = len(tokens) + len(piece.tokens)
            found.append((piece.feed, range(end - piece.wanted, end)))
            tokens += piece.tokens
            if piece.short:
                tokens += [0] * (count - len(piece.tokens))
            else:
                parts.append((1, len(piece.tokens), self._prompt(piece)))
        if len(parts) == 1:
            rows, count, attend = parts[0]
        else:
            rows, count, attend = 1, len(tokens), Segments(parts)
        tokens_BT = mx.array(tokens, dtype=mx.int32).reshape(rows, count)
        hidden_XD = self._decoder(tokens_BT, attend)
        return hidden_XD, found

    def _prompt(self, piece: Piece) -> Prompt:
        return Prompt(
            self._decoder.heads, self._store, self._row[piece.slot], piece.start, len(piece.tokens)
        )

    def _block(self, first: int, starts: Sequence[int], count: int) -> Block:
        return Block(self._decoder.heads, self._store, first, starts, count)
