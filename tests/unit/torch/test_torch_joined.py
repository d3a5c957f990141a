"""Which models decode through captured steps, and what joining does to the module."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2kit.backend.plan import TrainPlan
from tests.conftest import random_weights, small_spec
from tests.unit.torch.peers import SPECS, TOKENS, ours

torch = pytest.importorskip("torch")


def test_joined_parameters_are_views_that_compute_and_export_as_before() -> None:
    from qwen2kit_torch.engine.joined import join

    model = ours(SPECS["untied"])
    expected = model.logits(TOKENS)
    weights = join(model.module)
    layer, joint = model.module.model.layers[1], weights.layers[1]
    assert layer.self_attn.k_proj.weight.untyped_storage().data_ptr() == (
        joint.heads.untyped_storage().data_ptr()
    )
    assert joint.heads.shape == (4 * 16 + 2 * 2 * 16, 64)
    np.testing.assert_array_equal(model.logits(TOKENS), expected)
    source = random_weights(SPECS["untied"])
    for name, tensor in model.export():
        np.testing.assert_array_equal(tensor.float32(), source.read(name).float32())


def test_only_models_that_stay_as_they_are_on_cuda_are_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qwen2kit_torch.engine.joined import can_capture

    cuda = torch.device("cuda")
    pytest.importorskip("triton")
    monkeypatch.setenv("CC", "cc")
    capability = [(8, 6)]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability[0])
    plain = ours(SPECS["tied"]).module
    assert can_capture(plain, cuda)
    assert not can_capture(plain, torch.device("cpu"))
    assert not can_capture(ours(SPECS["tied"], train=TrainPlan()).module, cuda)
    assert not can_capture(ours(small_spec(head_dim=24)).module, cuda)
    packed = ours(SPECS["tied"], weight_bits=8, weight_group_size=32).module
    assert can_capture(packed, cuda)
    packed.model.layers[0].mlp.up_proj.group = 64
    assert not can_capture(packed, cuda)
    capability[0] = (7, 5)
    assert not can_capture(plain, cuda)
    capability[0] = (9, 0)
    assert can_capture(plain, cuda)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not can_capture(plain, cuda)
