"""ModelSpec: everything that decides what a Qwen2-family model computes, and nothing else.

Field names are those of Hugging Face ``config.json``. A spec holds no weights, no dtype and no
device; it is hashable data that backends compile, that `schema` expands into parameters and that
`hf` reads from and writes to disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwen2kit.errors import ConfigError


def _check_size(name: str, value: int, limit: int) -> None:
    if value <= 0:
        raise ConfigError(f"{name} must be positive, got {value}")
    if value > limit:
        raise ConfigError(f"{name} must be at most {limit}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN frequency interpolation (arXiv 2309.00071, as transformers computes it)."""

    kind: Literal["yarn"] = "yarn"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every frequency divided by ``factor`` (arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoPESpec:
    """Rotary position embedding, half-split (NeoX) layout."""

    rope_theta: float = 1_000_000.0
    scaling: YarnScaling | LinearScaling | None = None

    def __post_init__(self) -> None:
        if not self.rope_theta > 1:
            raise ConfigError(f"rope_theta must be greater than 1, got {self.rope_theta}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindowSpec:
    """Layers ``>= max_window_layers`` see only the last ``sliding_window`` keys when ``enabled``.

    Every published checkpoint carries the two numbers with ``enabled=False``; they are kept so
    that a config survives a round trip.
    """

    enabled: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28

    def __post_init__(self) -> None:
        if self.enabled and not (self.sliding_window and self.sliding_window > 0):
            raise ConfigError(
                f"sliding_window must be positive when enabled, got {self.sliding_window}"
            )
        if self.max_window_layers < 0:
            raise ConfigError(
                f"max_window_layers must not be negative, got {self.max_window_layers}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DualChunkSpec:
    """Dual chunk attention settings (arXiv 2402.17463), as stored by the Qwen2.5-1M checkpoints."""

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.local_size < self.chunk_size:
            raise ConfigError(
                "dual chunk attention needs 0 < local_size < chunk_size, got "
                f"local_size={self.local_size} and chunk_size={self.chunk_size}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Fine-grained mixture of experts (report section 2.2.2)."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False

    def __post_init__(self) -> None:
        _check_size("num_experts", self.num_experts, 1 << 14)
        _check_size("num_experts_per_tok", self.num_experts_per_tok, self.num_experts)
        _check_size("moe_intermediate_size", self.moe_intermediate_size, 1 << 22)
        _check_size(
            "shared_expert_intermediate_size", self.shared_expert_intermediate_size, 1 << 22
        )
        _check_size("decoder_sparse_step", self.decoder_sparse_step, 1 << 20)

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (0-based) has experts instead of a dense MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A Qwen2-family decoder (Qwen1.5, Qwen2, Qwen2.5; dense or MoE).

    Raises:
        ConfigError: a size is not positive or absurdly large, ``num_attention_heads`` is not a
            multiple of ``num_key_value_heads``, ``head_dim`` is odd, or the attention, RoPE or
            expert settings are impossible.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope: RoPESpec = field(default_factory=RoPESpec)
    window: SlidingWindowSpec = field(default_factory=SlidingWindowSpec)
    dual_chunk: DualChunkSpec | None = None
    moe: MoESpec | None = None
    bos_token_id: int | None = 151643
    eos_token_id: int | tuple[int, ...] | None = 151643
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            _check_size(name, getattr(self, name), limit)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if not self.rms_norm_eps > 0:
            raise ConfigError(f"rms_norm_eps must be positive, got {self.rms_norm_eps}")
        if not self.initializer_range >= 0:
            raise ConfigError(
                f"initializer_range must not be negative, got {self.initializer_range}"
            )

    @property
    def model_type(self) -> Literal["qwen2", "qwen2_moe"]:
        """The ``model_type`` string of Hugging Face, mlx-lm and vLLM."""
        return "qwen2" if self.moe is None else "qwen2_moe"

    @property
    def context_length(self) -> int:
        """Positions the model is meant for: ``max_position_embeddings``, or with YaRN at least
        ``factor`` times the training length, since published configs switch YaRN on without
        raising ``max_position_embeddings``."""
        scaling = self.rope.scaling
        if isinstance(scaling, YarnScaling):
            stretched = int(scaling.factor * scaling.original_max_position_embeddings)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` is a mixture of experts."""
        return self.moe is not None and self.moe.is_sparse(layer)

    def window_of(self, layer: int) -> int | None:
        """Sliding-window length in tokens of decoder layer ``layer``; None means full attention."""
        if self.window.enabled and layer >= self.window.max_window_layers:
            return self.window.sliding_window
        return None


_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 31,
}
