"""Which keys a query may see, and scaled dot-product attention over grouped heads.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, C head_dim. Masks are
boolean, True where visible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Attention whose visible keys are settled."""

    def __call__(self, q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, /) -> Tensor:
        """Output ``[B, H, T, C]``; softmax scale is ``C ** -0.5``."""
        ...


@dataclass(frozen=True, slots=True)
class Visibility:
    """What one forward pass may attend to, for one kind of layer.

    Attributes:
        mask: ``[B or 1, 1, T, S]``, or None when `causal` says everything.
        causal: query ``t`` sees keys ``0..t``; if False and there is no mask, it sees all keys.
    """

    mask: Tensor | None
    causal: bool

    def __call__(self, q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        """Attention output ``[B, H, T, C]``; softmax scale is ``C ** -0.5``."""
        batch, heads, length, width = q_BHTC.shape
        kv_heads = k_BKSC.shape[1]
        if length == 1:
            # One query per head: the heads of a group can stand in for query positions.
            grouped = q_BHTC.reshape(batch, kv_heads, heads // kv_heads, width)
            out = F.scaled_dot_product_attention(grouped, k_BKSC, v_BKSC, attn_mask=self.mask)
            return out.reshape(batch, heads, 1, width)
        return F.scaled_dot_product_attention(
            q_BHTC,
            k_BKSC,
            v_BKSC,
            attn_mask=self.mask,
            is_causal=self.causal,
            enable_gqa=heads != kv_heads,
        )


def visibilities(
    windows: Iterable[int | None],
    *,
    start: int,
    length: int,
    documents: Tensor | None,
    device: torch.device,
) -> dict[int | None, Visibility]:
    """Visibility for every window length in use (None is full attention).

    Args:
        windows: sliding-window lengths in tokens.
        start: tokens already cached.
        length: T, the number of new tokens per row.
        documents: ``[B, T]`` document numbers that attention must not cross, or None.
        device: where masks are built.
    """
    build = _MaskBuilder(start, length, documents, device)
    return {window: build(window) for window in set(windows)}


class _MaskBuilder:
    def __init__(
        self, start: int, length: int, documents: Tensor | None, device: torch.device
    ) -> None:
        self.start, self.length, self.documents, self.device = start, length, documents, device
        self.total = start + length

    def __call__(self, window: int | None) -> Visibility:
        in_reach = window is None or self.total <= window
        if in_reach and self.documents is None:
            if self.length == 1:
                return Visibility(None, causal=False)
            if self.start == 0:
                return Visibility(None, causal=True)
        return Visibility(self._mask(None if in_reach else window), causal=False)

    def _mask(self, window: int | None) -> Tensor:
        queries_T = torch.arange(self.start, self.total, device=self.device)
        keys_S = torch.arange(self.total, device=self.device)
        distance_BTS = (queries_T[:, None] - keys_S)[None]
        visible = distance_BTS >= 0
        if window is not None:
            visible &= distance_BTS < window
        if self.documents is not None:
            visible = visible & (self.documents[:, :, None] == self.documents[:, None, :])
        return visible[:, None]
