"""The same weights in mlx-lm's own Qwen2: dense, quantised, and step by step."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
qwen2 = pytest.importorskip("mlx_lm.models.qwen2")

import mlx.nn as nn  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402

from qwen2kit.engine.generate import generate  # noqa: E402
from qwen2kit.generate.sampling import Sampling  # noqa: E402
from qwen2kit.spec.hf import to_hf_config  # noqa: E402
from qwen2kit.spec.model import ModelSpec  # noqa: E402
from qwen2kit.spec.schema import schema  # noqa: E402
from tests.conftest import random_weights  # noqa: E402
from tests.unit.mlx.setup_mlx import KERNELS, SPECS, PackedSource, model  # noqa: E402

TOKENS = np.random.default_rng(7).integers(0, 199, 31).tolist()


def mlx_lm_model(spec: ModelSpec, bits: int | None) -> nn.Module:
    weights = random_weights(spec)
    args = qwen2.ModelArgs.from_dict(to_hf_config(spec, dtype="float32"))
    theirs = qwen2.Model(args)
    theirs.load_weights([(n, mx.array(weights.read(n).raw())) for n in weights.names()])
    if bits is not None:
        nn.quantize(theirs, group_size=32, bits=bits)
    theirs.eval()
    return theirs


def logits_of(theirs: nn.Module) -> np.ndarray:
    with mx.stream(mx.cpu):
        return np.array(theirs(mx.array([TOKENS]))[0])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", ["tied", "untied", "yarn"])
def test_logits_and_greedy_text_agree(name: str, bits: int | None, kernels: str) -> None:
    spec = SPECS[name]
    formats = {p.name: (bits, 32) for p in schema(spec) if p.quantizable} if bits else {}
    ours = model(spec, PackedSource(random_weights(spec), formats), kernels)
    theirs = mlx_lm_model(spec, bits)
    expected = logits_of(theirs)
    assert np.abs(ours.logits(TOKENS) - expected).max() < 1e-4 * np.abs(expected).max()
    with mx.stream(mx.cpu):
        steps = generate_step(mx.array(TOKENS), theirs, stream=mx.default_stream(mx.cpu),
                              max_tokens=20)  # fmt: skip
        text = [token for token, _ in steps]
    assert [e.token for e in generate(ours, [TOKENS], Sampling(max_new_tokens=20))] == text
