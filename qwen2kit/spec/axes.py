"""Logical axis names. A parameter's dimensions are named once; sharding, quantisation, memory and
weight-decay rules are written against these names and never against module classes."""

from __future__ import annotations

from enum import StrEnum


class Axis(StrEnum):
    """What one dimension of a parameter means."""

    VOCAB = "vocab"
    EMBED = "embed"
    HEADS = "heads"
    KV_HEADS = "kv_heads"
    HEAD = "head"
    FFN = "ffn"
    EXPERT = "expert"
    EXPERT_FFN = "expert_ffn"
    SHARED_FFN = "shared_ffn"
    ONE = "one"


Dim = tuple[Axis, ...]
"""One dimension of a tensor: usually one axis, or several fused ones, e.g. ``(HEADS, HEAD)``."""
