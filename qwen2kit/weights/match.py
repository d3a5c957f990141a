"""Does a weight source fit a spec? One check used before every load and after every conversion."""

from __future__ import annotations

from qwen2kit.errors import WeightError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import LM_HEAD, schema
from qwen2kit.weights.source import WeightSource

# Buffers that old exporters stored although they follow from the config.
_DERIVED_SUFFIXES = ("rotary_emb.inv_freq", "self_attn.bias", "self_attn.masked_bias")


def check_fits(spec: ModelSpec, weights: WeightSource) -> None:
    """Compare names and shapes of ``weights`` with the schema of ``spec``.

    A stored ``lm_head.weight`` is tolerated for a tied spec (many exporters duplicate it).

    Raises:
        WeightError: naming up to three missing, unexpected or misshapen tensors.
    """
    expected = {param.name: param.shape for param in schema(spec)}
    present = {n for n in weights.names() if not n.endswith(_DERIVED_SUFFIXES)}
    if spec.tie_word_embeddings:
        present.discard(LM_HEAD)
    missing = [name for name in expected if name not in present]
    unexpected = sorted(present - set(expected))
    misshapen = [
        f"{name} is {list(weights.info(name).shape)}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in present and weights.info(name).shape != shape
    ]
    problems = [
        *_listed("missing", missing),
        *_listed("unexpected", unexpected),
        *_listed("wrong shape", misshapen),
    ]
    if problems:
        raise WeightError("weights do not fit config.json: " + "; ".join(problems))


def _listed(label: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{label}: {', '.join(names[:3])}{more}"]
