"""Canonical parameter names <-> GGUF tensor names, as one table of rows read in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import EMBED_TOKENS, FINAL_NORM, LM_HEAD, Param, schema

GGUF_EMBED, GGUF_HEAD = "token_embd.weight", "output.weight"

_OUTSIDE = {EMBED_TOKENS: GGUF_EMBED, FINAL_NORM: "output_norm.weight", LM_HEAD: GGUF_HEAD}

# Module inside a decoder layer -> stem inside ``blk.N``; ``experts`` rows stack over the expert.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


@dataclass(frozen=True, slots=True)
class GgufSlot:
    """One tensor of a GGUF file and the canonical parameters it holds.

    Attributes:
        name: GGUF name.
        params: one parameter, or all experts' in order when ``stacked``.
        stacked: whether the first dimension is the expert.
    """

    name: str
    params: tuple[Param, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape on disk; the shared expert's gate ``[1, D]`` is stored as ``[D]``."""
        inner = self.params[0].shape
        if self.stacked:
            return (len(self.params), *inner)
        return inner[1:] if len(inner) == 2 and inner[0] == 1 else inner


def gguf_name(param: Param) -> str:
    """GGUF name of the tensor that holds ``param``."""
    if param.layer is None:
        return _OUTSIDE[param.name]
    inside = param.name.removeprefix(f"model.layers.{param.layer}.")
    if param.expert is not None:
        inside = inside.replace(f".experts.{param.expert}.", ".experts.")
    module, _, kind = inside.rpartition(".")
    return f"blk.{param.layer}.{_LAYER[module]}.{kind}"


def gguf_slots(spec: ModelSpec) -> Iterator[GgufSlot]:
    """All tensors of a GGUF file of ``spec`` in schema order."""
    members: dict[str, list[Param]] = {}
    for param in schema(spec):
        members.setdefault(gguf_name(param), []).append(param)
    for name, params in members.items():
        yield GgufSlot(name, tuple(params), stacked=params[0].expert is not None)
