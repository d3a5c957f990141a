"""TorchModel: a spec compiled for inference on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from qwen2kit.backend.limits import (
    check_cache_bits,
    check_scores,
    check_tokens,
    check_weight_bits,
    context_limit,
)
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import LoadReport, Score, ScoreRequest, TokenIds
from qwen2kit.backend.slots import PersistentSlots
from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.weights.source import WeightSource
from qwen2kit.weights.tensor import HostTensor
from qwen2kit_torch.devices import resolve_device, resolve_dtype
from qwen2kit_torch.engine.eager import EagerSlots
from qwen2kit_torch.engine.joined import JoinedWeights, can_capture, join
from qwen2kit_torch.model import Qwen2
from qwen2kit_torch.quantized import BITS, can_read, quantize_layers
from qwen2kit_torch.score import score
from qwen2kit_torch.weights import export_weights, load_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LOGITS_AT_ONCE = 1 << 25


class TorchModel:
    """Implements `qwen2kit.backend.protocol.CompiledModel`.

    With ``plan.train`` set (see the trainable subclass) parameters are float32 masters of their
    own; otherwise they have the compute dtype, may share memory with the weight file, and are
    never written.

    Attributes:
        spec: the model.
        plan: what it was compiled for.
        device: where it runs.
        limit: longest sequence in tokens.
        dtype: compute dtype.
        module: the network, on the meta device until weights are loaded.

    Raises:
        BackendError: the device does not exist here, the spec is a mixture of experts, or
            ``plan.max_seq_len`` is out of range.
    """

    def __init__(self, spec: ModelSpec, plan: ExecutionPlan) -> None:
        self.spec = spec
        self.plan = plan
        self.device = resolve_device(plan)
        self.dtype = resolve_dtype(plan, self.device)
        check_cache_bits(plan, ())
        check_weight_bits(plan, BITS)
        self.limit = context_limit(spec, plan)
        if plan.cpu_threads is not None:
            torch.set_num_threads(plan.cpu_threads)
        self._joined: JoinedWeights | None = None
        masters = plan.train is not None
        self.module = Qwen2(spec, device="meta", dtype=torch.float32 if masters else self.dtype)
        if plan.weight_bits is not None:
            quantize_layers(self.module, bits=plan.weight_bits, group=plan.weight_group_size)

    def load(self, weights: WeightSource) -> LoadReport:
        """Fill every parameter, strictly. Raises WeightError if names or shapes do not fit."""
        self._joined = None
        report = load_weights(self.module, weights, device=self.device)
        if self.plan.train is None and self.dtype == torch.float32:
            self.module.anchor_keys()
        bits = self.plan.weight_bits
        if bits is None or self.device.type != "cpu" or can_read(bits, self.dtype):
            return report
        dtype = str(self.dtype).removeprefix("torch.")
        note = (
            f"a CPU decodes {bits}-bit weights in {dtype} expanded: "
            "they take as much memory as without --weight-bits; 4 bits in bfloat16 stay packed"
        )
        return replace(report, notes=(note,))

    def export(self) -> Iterator[tuple[str, HostTensor]]:
        """All schema parameters in schema order, canonical names, in the parameters' dtype."""
        self._check_loaded()
        return export_weights(self.module)

    def logits(self, tokens: TokenIds) -> NDArray[np.float32]:
        """Logits ``[T, vocab]`` in float32, without any cache."""
        self._check(tokens, "the input")
        out = np.empty((len(tokens), self.spec.vocab_size), dtype=np.float32)
        with torch.inference_mode():
            hidden = self.module.forward_hidden(torch.tensor([tokens], device=self.device))[0]
            step = max(1, _LOGITS_AT_ONCE // self.spec.vocab_size)
            for start in range(0, len(hidden), step):
                part = self.module.head(hidden[start : start + step]).float()
                out[start : start + step] = part.cpu().numpy()
        return out

    def hidden_states(self, tokens: TokenIds) -> NDArray[np.float32]:
        """``[layers + 2, T, hidden]`` float32: embedding, every layer, final norm."""
        self._check(tokens, "the input")
        with torch.inference_mode():
            trace = self.module.hidden_trace(torch.tensor([tokens], device=self.device))
            return np.stack([state[0].float().cpu().numpy() for state in trace])

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        """Log-probabilities of continuations.

        Raises:
            BackendError: a request has an empty side, foreign token ids, or is too long.
        """
        self._check_loaded()
        check_scores(requests, self.spec, self.limit)
        return score(self.module, requests) if requests else iter(())

    def slots(self, count: int, capacity: int) -> PersistentSlots:
        """Room for up to ``count`` sequences of ``capacity`` tokens; see the protocol.

        Raises:
            BackendError: not even one fits, or ``capacity`` is beyond the model's limit.
        """
        self._check_loaded()
        if count < 1 or not 1 <= capacity <= self.limit:
            raise BackendError(
                f"slots({count}, {capacity}): a model takes at least one slot, of 1 to "
                f"{self.limit} tokens"
            )
        if self.plan.train is None and can_capture(self.module, self.device):
            return self._graph_slots(count, capacity)
        return EagerSlots(self.module, count=count, capacity=capacity)

    def _graph_slots(self, count: int, capacity: int) -> PersistentSlots:
        from qwen2kit_torch.engine.graphs import GraphSlots

        if self._joined is None:
            self._joined = join(self.module)
        return GraphSlots(self.module, self._joined, count=count, capacity=capacity)

    def _check(self, tokens: Sequence[int], what: str) -> None:
        self._check_loaded()
        check_tokens(tokens, self.spec, self.limit, what)

    def _check_loaded(self) -> None:
        if self.module.model.embed_tokens.weight.is_meta:
            raise BackendError("the model has no weights yet; load them first")
