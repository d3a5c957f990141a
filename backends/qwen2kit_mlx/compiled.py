"""MLXModel: a spec made runnable by MLX on one device (`CompiledModel`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.limits import check_scores, check_tokens
from qwen2kit.backend.protocol import LoadReport, Score, ScoreRequest, TokenIds
from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.weights.source import WeightSource
from qwen2kit.weights.tensor import HostTensor
from qwen2kit_mlx.attention import Fresh
from qwen2kit_mlx.device_logits import LOGIT_ROWS
from qwen2kit_mlx.kernels import Kernels
from qwen2kit_mlx.memory import free_bytes, slots_that_fit, token_bytes
from qwen2kit_mlx.model import Decoder
from qwen2kit_mlx.score import score
from qwen2kit_mlx.slots import MLXSlots
from qwen2kit_mlx.weights import WeightLoader


class MLXModel:
    """See `qwen2kit.backend.protocol.CompiledModel`.

    Args:
        spec: a dense spec.
        device: where everything is stored and computed.
        dtype: compute dtype.
        kernels: who computes products and attention.
        limit: positions a sequence may fill.
        cache_bits: how many slots keep keys and values in; None keeps them as computed.

    Attributes:
        spec, limit: as given.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: mx.Device,
        dtype: mx.Dtype,
        kernels: Kernels,
        limit: int,
        cache_bits: int | None = None,
    ) -> None:
        self.spec = spec
        self._device, self._dtype, self._kernels, self.limit = device, dtype, kernels, limit
        self._cache_bits = cache_bits
        self._loader: WeightLoader | None = None
        self._decoder: Decoder | None = None

    def load(self, weights: WeightSource) -> LoadReport:
        """See `CompiledModel.load`; MLX-quantised tensors stay packed."""
        started = time.perf_counter()
        # In 16 bits rotations are MLX's own. Packed caches hold what mlx-lm's hold.
        anchored = self._dtype == mx.float32 and self._cache_bits is None
        loader = WeightLoader(self.spec, self._kernels, self._dtype, anchored=anchored)
        with mx.stream(self._device):
            params = loader.load(weights)
            self._decoder = Decoder(self.spec, params, self._kernels, self._dtype)
            mx.clear_cache()
        self._loader = loader
        return LoadReport(
            tensors=loader.tensors, bytes=loader.bytes, seconds=time.perf_counter() - started
        )

    def export(self) -> Iterator[tuple[str, HostTensor]]:
        """See `CompiledModel.export`; values are in the compute dtype."""
        if self._loader is None:
            raise BackendError("the model has no weights yet; call load first")
        return self._loader.export(self._device)

    def logits(self, tokens: TokenIds) -> NDArray[np.float32]:
        """See `CompiledModel.logits`."""
        decoder = self._ready()
        check_tokens(tokens, self.spec, self.limit, "sequence")
        out_TV = np.empty((len(tokens), self.spec.vocab_size), dtype=np.float32)
        with mx.stream(self._device):
            x_TD = decoder(_row(tokens), Fresh(decoder.heads, len(tokens)))
            for start in range(0, len(tokens), LOGIT_ROWS):
                rows = slice(start, start + LOGIT_ROWS)
                out_TV[rows] = np.asarray(decoder.logits(x_TD[rows]).astype(mx.float32))
        return out_TV

    def hidden_states(self, tokens: TokenIds) -> NDArray[np.float32]:
        """See `CompiledModel.hidden_states`."""
        decoder = self._ready()
        check_tokens(tokens, self.spec, self.limit, "sequence")
        trace: list[mx.array] = []
        with mx.stream(self._device):
            x_TD = decoder(_row(tokens), Fresh(decoder.heads, len(tokens)), trace)
            states = mx.stack([*trace, decoder.final_norm(x_TD)])
            return np.array(states.astype(mx.float32))

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        """See `CompiledModel.score`."""
        decoder = self._ready()
        check_scores(requests, self.spec, self.limit)
        return score(decoder, requests, self._device)

    def slots(self, count: int, capacity: int) -> MLXSlots:
        """See `CompiledModel.slots`."""
        decoder = self._ready()
        if count < 1 or not 1 <= capacity <= self.limit:
            raise BackendError(
                f"{count} slots of {capacity} tokens are impossible; a slot of this model holds "
                f"1 to {self.limit} tokens"
            )
        size = token_bytes(self.spec, self._dtype, self._cache_bits)
        count = slots_that_fit(count, capacity, size, free_bytes(self._device))
        return MLXSlots(decoder, count, capacity, self._device, self._cache_bits)

    def _ready(self) -> Decoder:
        if self._decoder is None:
            raise BackendError("the model has no weights yet; call load first")
        return self._decoder


def _row(tokens: TokenIds) -> mx.array:
    return mx.array([tuple(tokens)], dtype=mx.int32)
