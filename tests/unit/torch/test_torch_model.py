"""Numerics of the torch model: against transformers, the NumPy reference, and itself."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.spec.schema import schema
from tests.conftest import random_weights, small_spec
from tests.unit.torch.peers import SPECS, TOKENS, ours, theirs

torch = pytest.importorskip("torch")

LONG = np.random.default_rng(1).integers(0, 199, 200).tolist()


@pytest.mark.parametrize("name", SPECS)
def test_logits_match_transformers(name: str) -> None:
    spec = SPECS[name]
    with torch.no_grad():
        expected = theirs(spec)(torch.tensor([LONG])).logits[0].numpy()
    actual = ours(spec).logits(LONG)
    assert actual.dtype == np.float32
    assert np.abs(expected).max() > 1
    assert np.abs(actual - expected).max() <= 1e-4


@pytest.mark.parametrize("name", SPECS)
def test_hidden_states_match_the_reference(name: str) -> None:
    spec = SPECS[name]
    expected = ReferenceModel(spec, random_weights(spec)).hidden_states(TOKENS)
    actual = ours(spec).hidden_states(TOKENS)
    assert actual.shape == (spec.num_hidden_layers + 2, len(TOKENS), spec.hidden_size)
    assert np.abs(actual - expected).max() <= 1e-5


def test_hidden_states_match_transformers() -> None:
    spec = SPECS["untied"]
    with torch.no_grad():
        states = theirs(spec)(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    actual = ours(spec).hidden_states(TOKENS)
    # transformers reports the last layer's output only after the final norm.
    for index, expected in enumerate(states[:-1]):
        assert np.abs(actual[index] - expected[0].numpy()).max() <= 1e-5
    assert np.abs(actual[-1] - states[-1][0].numpy()).max() <= 1e-4


@pytest.mark.parametrize("name", ["tied", "untied", "window"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(name: str) -> None:
    spec = SPECS[name]
    exact = ours(spec).logits(TOKENS)
    with torch.no_grad():
        peer = theirs(spec, "bfloat16")(torch.tensor([TOKENS])).logits[0].float().numpy()
    actual = ours(spec, dtype="bfloat16").logits(TOKENS)
    assert np.abs(actual - exact).mean() <= 1.25 * np.abs(peer - exact).mean()
    assert np.abs(actual - exact).max() < 0.15


def test_state_dict_names_and_shapes_are_the_schema() -> None:
    from qwen2kit_torch.model import Qwen2

    for spec in (small_spec(), small_spec(tied=False)):
        state = Qwen2(spec, device="meta").state_dict()
        assert {name: tuple(t.shape) for name, t in state.items()} == {
            param.name: param.shape for param in schema(spec)
        }


@pytest.mark.parametrize("name", ["tied", "window"])
def test_packed_documents_equal_separate_forwards(name: str) -> None:
    module = ours(SPECS[name]).module
    parts = [TOKENS[:7], TOKENS[7:8], TOKENS[8:]]
    documents = torch.tensor([[i for i, part in enumerate(parts) for _ in part]])
    positions = torch.tensor([[p for part in parts for p in range(len(part))]])
    with torch.no_grad():
        packed = module.forward_hidden(
            torch.tensor([TOKENS]), positions=positions, documents=documents
        )
        apart = [module.forward_hidden(torch.tensor([part])) for part in parts]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=0, atol=1e-5)


def test_gradients_match_transformers() -> None:
    from qwen2kit_torch.model import Qwen2

    spec = SPECS["tied"]
    peer = theirs(spec)
    module = Qwen2(spec)
    weights = random_weights(spec)
    module.load_state_dict(
        {name: torch.tensor(weights.read(name).float32()) for name in weights.names()}
    )
    batch = torch.tensor([TOKENS, TOKENS[::-1]])
    for model in (peer, module):
        logits = model(batch).logits if model is peer else model(batch)
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        ).backward()
    expected = dict(peer.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 80), (520, 512)])
def test_inference_kernels_equal_the_plain_product(
    dtype: str, rows: int, inputs: int, outputs: int
) -> None:
    from qwen2kit_torch.linear import Linear

    torch.manual_seed(0)
    layer = Linear(
        inputs, outputs, device=torch.device("cpu"), dtype=getattr(torch, dtype), bias=True
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=inputs**-0.5)
    layer.requires_grad_(False)
    x = torch.randn(2, rows, inputs).to(layer.weight.dtype)
    weight = layer.weight.detach().clone()
    expected = torch.nn.functional.linear(x.double(), weight.double(), layer.bias.double())
    layer.pack()
    with torch.inference_mode():
        actual = layer(x)
    assert torch.equal(layer.dense_weight(), weight)
    tolerance = {"float32": 1e-5, "bfloat16": 8e-3}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
