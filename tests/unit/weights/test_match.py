"""check_fits names what is missing, unexpected or misshapen, and tolerates known duplicates."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2kit.errors import WeightError
from qwen2kit.spec.schema import FINAL_NORM, LM_HEAD
from qwen2kit.weights.match import check_fits
from qwen2kit.weights.source import MemorySource
from qwen2kit.weights.tensor import HostTensor, from_float32
from tests.conftest import random_weights, small_spec


def tensors(**spec: object) -> dict[str, HostTensor]:
    source = random_weights(small_spec(**spec))  # type: ignore[arg-type]
    return {name: source.read(name) for name in source.names()}


def zeros(*shape: int) -> HostTensor:
    return from_float32(np.zeros(shape, dtype=np.float32), "float32")


def test_matching_weights_pass() -> None:
    check_fits(small_spec(), MemorySource(tensors()))


def test_missing_tensors_are_named_and_counted() -> None:
    kept = {k: v for k, v in tensors().items() if not k.endswith("_proj.bias")}
    with pytest.raises(WeightError, match=r"missing: model\.layers\.0.*q_proj\.bias.* and 6 more"):
        check_fits(small_spec(), MemorySource(kept))


def test_unexpected_tensors_are_named() -> None:
    with pytest.raises(WeightError, match=r"unexpected: model\.extra\.weight"):
        check_fits(small_spec(), MemorySource(tensors() | {"model.extra.weight": zeros(2)}))


def test_shapes_are_compared() -> None:
    with pytest.raises(WeightError, match=r"model\.norm\.weight is \[65\], .* \[64\]"):
        check_fits(small_spec(), MemorySource(tensors() | {FINAL_NORM: zeros(65)}))


def test_a_duplicated_tied_head_is_tolerated_but_an_untied_one_is_required() -> None:
    check_fits(small_spec(), MemorySource(tensors() | {LM_HEAD: zeros(199, 64)}))
    with pytest.raises(WeightError, match=r"missing: lm_head\.weight"):
        check_fits(small_spec(tied=False), MemorySource(tensors()))


def test_buffers_of_old_exporters_are_ignored() -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": zeros(8)}
    check_fits(small_spec(), MemorySource(tensors() | old))
