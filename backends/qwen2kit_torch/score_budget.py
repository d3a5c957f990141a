"""How much of a prefix tree one forward pass takes, from the memory that is free."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec
from qwen2kit_torch.model import Qwen2

# A CPU is busy with this many tokens; masks make larger packs dearer there.
CPU_TOKENS = 256
# A GPU is busy with this many; more only make the first answer come later.
_GPU_TOKENS = 16384
_LOGIT_ROWS = 2048
_CPU_LOGITS = 1 << 25
# Shares of the free memory; the rest is for the allocator's rounding and for other programs.
_FOR_TOKENS, _FOR_KEYS, _FOR_LOGITS = 0.5, 0.15, 0.15


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of one pass.

    Attributes:
        tokens: fed tokens.
        keys: keys that attention reads, summed over the runs of a pack; None where masks are used.
        logits: positions whose logits exist at the same time.
    """

    tokens: int
    keys: int | None
    logits: int

    def halved(self) -> Budget:
        """Half of everything.

        Raises:
            BackendError: it was one token already.
        """
        if self.tokens == 1:
            raise BackendError(
                "out of memory while scoring single tokens; free the device's memory, use shorter "
                "prompts or a smaller dtype"
            )
        keys = None if self.keys is None else max(1, self.keys // 2)
        return Budget(self.tokens // 2, keys, max(1, self.logits // 2))


def budget_of(model: Qwen2) -> Budget:
    """What fits beside ``model`` on its device."""
    weight = model.model.embed_tokens.weight
    spec = model.spec
    if weight.device.type != "cuda":
        return Budget(CPU_TOKENS, None, max(1, _CPU_LOGITS // spec.vocab_size))
    return within(_free(weight.device), spec, weight.element_size())


def within(free: int, spec: ModelSpec, width: int) -> Budget:
    """What fits in ``free`` bytes when an activation takes ``width`` bytes."""
    cached = 2 * spec.num_key_value_heads * spec.head_dim * width
    # Widest moment of a layer: the MLP's four intermediates, the residual stream, float32 norms.
    hidden = (4 * spec.intermediate_size + 8 * spec.hidden_size) * width + 8 * spec.hidden_size
    token = hidden + cached * (spec.num_hidden_layers + 1)
    row = spec.vocab_size * (width + 8)  # logits, in float32, and what log-sum-exp makes of them
    return Budget(
        tokens=_between(1, int(free * _FOR_TOKENS / token), _GPU_TOKENS),
        keys=max(1, int(free * _FOR_KEYS / cached)),
        logits=_between(1, int(free * _FOR_LOGITS / row), _LOGIT_ROWS),
    )


def _free(device: torch.device) -> int:
    """Bytes that an allocation can get: the driver's, and what the allocator holds unused."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def _between(low: int, value: int, high: int) -> int:
    return min(max(low, value), high)
