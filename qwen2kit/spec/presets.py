"""The published sizes as rows of data, plus ``tiny`` for tests and the embedded demo.

Sources: report table 1 and the released ``config.json`` files. Vocabulary sizes are the padded
embedding rows of the checkpoints, not the 151,646 tokens of the report's table.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2kit.errors import ConfigError
from qwen2kit.spec.model import ModelSpec, MoESpec, RoPESpec, SlidingWindowSpec


@dataclass(frozen=True, slots=True)
class _Row:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    max_position: int = 131072
    eps: float = 1e-6
    theta: float = 1_000_000.0
    window: int | None = 131072
    moe: MoESpec | None = None


_MOE_57B = MoESpec(
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=2560,
    shared_expert_intermediate_size=20480,
)
_MOE_A27B = MoESpec(
    num_experts=60,
    num_experts_per_tok=4,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
)

_ROWS: dict[str, _Row] = {
    "tiny": _Row(128, 3, 4, 2, 32, 256, 512, True, 512, theta=1_000.0, window=None),
    "qwen2-0.5b": _Row(896, 24, 14, 2, 64, 4864, 151936, True),
    "qwen2-1.5b": _Row(1536, 28, 12, 2, 128, 8960, 151936, True),
    "qwen2-7b": _Row(3584, 28, 28, 4, 128, 18944, 152064, False),
    "qwen2-57b-a14b": _Row(3584, 28, 28, 4, 128, 18944, 151936, False, moe=_MOE_57B),
    "qwen2-72b": _Row(8192, 80, 64, 8, 128, 29568, 152064, False, eps=1e-5),
    "qwen1.5-moe-a2.7b": _Row(
        2048, 24, 16, 16, 128, 5632, 151936, False, 8192, window=32768, moe=_MOE_A27B
    ),
    "qwen2.5-0.5b": _Row(896, 24, 14, 2, 64, 4864, 151936, True, 32768, window=32768),
    "qwen2.5-1.5b": _Row(1536, 28, 12, 2, 128, 8960, 151936, True),
    "qwen2.5-3b": _Row(2048, 36, 16, 2, 128, 11008, 151936, True, 32768, window=32768),
    "qwen2.5-7b": _Row(3584, 28, 28, 4, 128, 18944, 152064, False),
    "qwen2.5-14b": _Row(5120, 48, 40, 8, 128, 13824, 152064, False, eps=1e-5),
    "qwen2.5-32b": _Row(5120, 64, 40, 8, 128, 27648, 152064, False, eps=1e-5),
    "qwen2.5-72b": _Row(8192, 80, 64, 8, 128, 29568, 152064, False, eps=1e-5),
}

PRESETS = tuple(_ROWS)
REPORT_PRESETS = ("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "qwen2-57b-a14b", "qwen2-72b")


def preset(name: str) -> ModelSpec:
    """The spec called ``name`` (see `PRESETS`), as the base checkpoint has it.

    Raises:
        ConfigError: no such preset.
    """
    row = _ROWS.get(name.lower())
    if row is None:
        raise ConfigError(f"unknown preset {name!r}; choose one of: {', '.join(PRESETS)}")
    return ModelSpec(
        vocab_size=row.vocab,
        hidden_size=row.hidden,
        intermediate_size=row.ffn,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        num_key_value_heads=row.kv_heads,
        head_dim=row.head_dim,
        tie_word_embeddings=row.tied,
        max_position_embeddings=row.max_position,
        rms_norm_eps=row.eps,
        rope=RoPESpec(rope_theta=row.theta),
        window=SlidingWindowSpec(sliding_window=row.window, max_window_layers=row.layers),
        moe=row.moe,
    )
