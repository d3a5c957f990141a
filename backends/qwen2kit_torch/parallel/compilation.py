"""torch.compile, one decoder layer at a time: all layers share one compiled graph."""

from __future__ import annotations

from typing import Any

from qwen2kit_torch.model import DecoderLayer

# Kinds of layers that one process may compile: specs, dtypes, adapters, with and without gradients.
_MOST_GRAPHS = 128


def compile_layer(layer: DecoderLayer) -> None:
    """Replace ``layer.forward`` by its compiled form.

    The forward function rather than the module is compiled, so that FSDP's hooks stay outside
    and parameter names stay as they are. All models of a process share that function, and with it
    torch's limit on graphs per function, which is made for one model.
    """
    import torch._dynamo.config

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
    compiled = torch.compile(layer.forward, fullgraph=True)
    layer.forward = compiled  # type: ignore[method-assign]
