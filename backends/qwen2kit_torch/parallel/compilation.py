"""torch.compile, one decoder layer at a time: all layers share one compiled graph."""

from __future__ import annotations

import torch

from qwen2kit_torch.model import DecoderLayer


def compile_layer(layer: DecoderLayer) -> None:
    """Replace ``layer.forward`` by its compiled form.

    The forward function rather than the module is compiled, so that FSDP's hooks stay outside
    and parameter names stay as they are.
    """
    compiled = torch.compile(layer.forward, fullgraph=True)
    layer.forward = compiled  # type: ignore[method-assign]
