"""Float8 matrix products of the decoder layers, by torchao's per-row scaled training."""

from __future__ import annotations

from qwen2kit.errors import MissingExtra
from qwen2kit_torch.model import DecoderLayer, Qwen2


def use_float8(network: Qwen2) -> None:
    """Replace the linear layers of every decoder layer by torchao's ``Float8Linear``.

    Parameters, their names and the optimizer stay as they are; embedding and head stay in
    bfloat16 (arXiv 2209.05433 on float8 formats).

    Raises:
        MissingExtra: torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise MissingExtra("float8", "torchao") from None
    config = Float8LinearConfig.from_recipe_name("rowwise")
    for module in network.modules():
        if isinstance(module, DecoderLayer):
            convert_to_float8_training(module, config=config)
