"""TrainStage: the part of a model that one process trains, from token ids or hidden states to
hidden states or the loss. Without pipelining it is the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from qwen2kit.plan.stages import Stage
from qwen2kit.spec.schema import EMBED_TOKENS, LM_HEAD
from qwen2kit_torch.attention import Attend
from qwen2kit_torch.fused.norm import normed
from qwen2kit_torch.model import DecoderLayer, Qwen2
from qwen2kit_torch.parallel.mesh import Mesh
from qwen2kit_torch.train.batch import MicroBatch
from qwen2kit_torch.train.loss import VocabShard, linear_cross_entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How a stage computes.

    Attributes:
        dtype: of the residual stream and of matrix products.
        loss_chunk_tokens: positions whose logits exist at once.
        tuned: compute the head's products by the algorithm that measures fastest.
    """

    dtype: torch.dtype
    loss_chunk_tokens: int
    tuned: bool = False


def prune(network: Qwen2, place: Stage) -> None:
    """Remove from ``network`` (on the meta device) what belongs to other stages."""
    if place.count == 1:
        return
    network.model.layers = nn.ModuleDict(  # type: ignore[assignment]
        {str(index): network.model.layers[index] for index in place.layers}
    )
    tied = network.spec.tie_word_embeddings
    if not place.first and not (place.last and tied):
        del network.model.embed_tokens
    if not place.last:
        del network.model.norm
        if not tied:
            del network.lm_head


class TrainStage(nn.Module):
    """One stage of ``network`` with its loss. Shapes: B rows, T tokens held here, D hidden.

    Its forward pass is told the number of a micro-batch, since that much a pipeline's schedule
    can pass on; the micro-batches themselves are laid out beforehand.

    Args:
        network: pruned to the stage, its parameters possibly DTensors over ``tp``.
        place: which stage it is.
        arithmetic: precision and memory of the computation.
        mesh: for the layout of hidden states and vocabulary under tensor parallelism.

    Attributes:
        micros: the micro-batches that `forward` will be asked for.
        scale: factor on their losses.
    """

    def __init__(self, network: Qwen2, place: Stage, arithmetic: Arithmetic, mesh: Mesh) -> None:
        super().__init__()
        self.network = network
        self.micros: Sequence[MicroBatch] = ()
        self.scale = 1.0
        self._place = place
        self._arithmetic = arithmetic
        self._tp = mesh.size("tp")
        self._vocab: VocabShard | None = None
        group = mesh.group("tp")
        if group is not None:
            share = network.spec.vocab_size // self._tp
            self._vocab = VocabShard(group, mesh.rank("tp") * share)

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states between stages."""
        return self._arithmetic.dtype

    @property
    def layers(self) -> tuple[DecoderLayer, ...]:
        """The decoder layers of this stage."""
        return tuple(m for m in self.network.model.layers.children() if isinstance(m, DecoderLayer))

    def hidden_shape(self, micro: MicroBatch) -> tuple[int, int, int]:
        """Shape of the hidden states of ``micro`` between stages."""
        rows, length = micro.tokens.shape
        return rows, length // self._tp, self.network.spec.hidden_size

    def forward(self, x: Tensor, number: Tensor | int) -> Tensor:
        """Hidden states ``[B, T, D]`` or, on the last stage, the scaled sum of losses, float32
        ``[1]``.

        Args:
            x: the previous stage's hidden states; not looked at on the first.
            number: which of `micros`; a tensor must be on the CPU.
        """
        micro = self.micros[int(number)]
        dtype = self._arithmetic.dtype
        mixed = dtype != torch.float32
        with torch.autocast(micro.tokens.device.type, dtype, enabled=mixed):
            if self._place.first:
                x = self._embed(micro.tokens)
            x = self._decode(x, self._rope(micro, x), micro.visible)
            if not self._place.last:
                return x
            x = self._norm(x)
        return self._loss(x, micro)[None] * self.scale

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.network.model.embed_tokens(tokens).to(self._arithmetic.dtype)
        # Under tensor parallelism this is a reduction in flight, whose type compiled layers
        # mistake; a copy waits for it.
        return x.clone() if self._tp > 1 else x

    def _decode(
        self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Mapping[int | None, Attend]
    ) -> Tensor:
        for layer in self.network.model.layers.children():
            x = layer(x, rope, visible, None)
        return x

    def _norm(self, x: Tensor) -> Tensor:
        """The final norm; nothing compiles it, so plain PyTorch would pass over memory often."""
        norm = self.network.model.norm
        if self._tp > 1 or not x.is_cuda:
            out: Tensor = norm(x)
            return out
        return normed(x, norm.weight, norm.eps)[1]

    def _rope(self, micro: MicroBatch, x: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.network.rotary.tables(micro.length, x.device, self.dtype)
        if micro.positions is None:
            return cos[: micro.length, None], sin[: micro.length, None]
        return cos[micro.positions][:, :, None], sin[micro.positions][:, :, None]

    def _loss(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        if isinstance(hidden, DTensor):
            # Each process will have the gradient of its share of the vocabulary only.
            whole = hidden.redistribute(placements=[Replicate()])
            hidden = whole.to_local(grad_placements=[Partial()])
        flat = hidden.flatten(0, 1)
        return linear_cross_entropy(
            flat if micro.where is None else flat[micro.where],
            self.head_weight(),
            micro.labels,
            chunk=self._arithmetic.loss_chunk_tokens,
            dtype=self._arithmetic.dtype,
            vocab=self._vocab,
            tuned=self._arithmetic.tuned,
        )

    def head_weight(self) -> Tensor:
        """The head matrix ``[V, D]``, or this process's rows of it."""
        name = EMBED_TOKENS if self.network.spec.tie_word_embeddings else LM_HEAD
        weight = self.network.get_parameter(name)
        return weight.to_local() if isinstance(weight, DTensor) else weight
