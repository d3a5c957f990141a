"""LoRA layers against PEFT: values at the start, losses of twenty steps; and what they promise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.adapters.lora import Adapter, LowRank, adaptable, factor_names, lora_scale
from qwen2kit.adapters.merge import AdaptedSource
from qwen2kit.backend.plan import LoRAPlan
from qwen2kit.backend.slots import Feed
from qwen2kit.errors import BackendError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.weights.tensor import HostTensor
from tests.conftest import random_weights, small_spec
from tests.tiny_adapter import TARGETS
from tests.unit.torch.peers import TOKENS, ours, theirs

torch = pytest.importorskip("torch")
from qwen2kit_torch.linear import Linear  # noqa: E402
from qwen2kit_torch.lora import (  # noqa: E402
    FrozenLinear,
    LoRALinear,
    add_lora,
    dropout,
)
from qwen2kit_torch.lora_weights import (  # noqa: E402
    export_factors,
    initial_factors,
    load_base,
    load_factors,
    stored_tensors,
)
from qwen2kit_torch.model import Qwen2  # noqa: E402
from qwen2kit_torch.weights import export_weights  # noqa: E402

CPU = torch.device("cpu")
PLAN = LoRAPlan(rank=4, alpha=8.0, targets=TARGETS)
ROWS = torch.tensor([TOKENS, TOKENS[::-1]])


def network(
    spec: ModelSpec, plan: LoRAPlan = PLAN, *, dtype: Any = torch.float32, random_b: bool = False
) -> Any:
    """A loaded model with adapters; B is zero unless ``random_b``."""
    made = Qwen2(spec, device="meta")
    add_lora(made, plan, dtype=dtype)
    load_base(made, random_weights(spec), CPU)
    load_factors(made, initial_factors(made, plan.seed))
    if random_b:
        generator = torch.Generator().manual_seed(5)
        for layer in made.modules():
            if isinstance(layer, LoRALinear):
                layer.lora_B.weight.data.normal_(0, 0.05, generator=generator)
    return made


def exported(model: Any, plan: LoRAPlan = PLAN) -> Adapter:
    factors = dict(export_factors(model))
    scale = lora_scale(plan.rank, plan.alpha, rslora=plan.rslora)
    paths = [path for path, _ in adaptable(model.spec) if factor_names(path)[0] in factors]
    modules = {p: LowRank(*(factors[name] for name in factor_names(p)), scale) for p in paths}
    return Adapter(path=Path("memory"), format="hf", modules=modules)


def mean_loss(logits: Any, rows: Any) -> Any:
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(flat, rows[:, 1:].reshape(-1))


@pytest.mark.parametrize("tied", [True, False])
def test_an_untrained_adapter_changes_nothing(tied: bool) -> None:
    spec = small_spec(tied=tied)
    assert torch.equal(network(spec)(ROWS), ours(spec).module(ROWS))


@pytest.mark.parametrize("rank", [4, 64], ids=["r=4", "r=d"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_layers_compute_what_the_merged_weights_do(rank: int, rslora: bool) -> None:
    spec = small_spec()
    plan = LoRAPlan(rank=rank, alpha=8.0, targets=TARGETS[:5], rslora=rslora)
    model = network(spec, plan, random_b=True)
    source = AdaptedSource(random_weights(spec), exported(model, plan))
    merged = ours(spec, source)
    found, expected = model(ROWS), merged.module(ROWS)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (found - ours(spec).module(ROWS)).abs().max() > 1e-2
    for name, tensor in export_weights(model):
        np.testing.assert_allclose(tensor.float32(), source.read(name).float32(), atol=1e-6)


def test_parameters_have_the_names_and_shapes_of_peft() -> None:
    peft = pytest.importorskip("peft")
    spec = small_spec()
    model = network(spec)
    config = peft.LoraConfig(r=4, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    peer = peft.get_peft_model(theirs(spec), config)
    state = peft.get_peft_model_state_dict(peer)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {f"base_model.model.{n}": p.shape for n, p in trainable.items()} == {
        n: p.shape for n, p in state.items()
    }
    assert all(p.dtype == torch.float32 for p in trainable.values())


def test_initial_values_are_distributed_as_peft_draws_them() -> None:
    peft = pytest.importorskip("peft")
    spec = small_spec()
    config = peft.LoraConfig(r=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    state = peft.get_peft_model_state_dict(peft.get_peft_model(theirs(spec), config))
    model = network(spec, LoRAPlan(rank=16, alpha=8.0, targets=TARGETS))
    for name, value in initial_factors(model, 0):
        peer = state[f"base_model.model.{name}"]
        if "lora_B" in name:
            assert not value.any()
            assert not peer.any()
            continue
        bound = value.shape[1] ** -0.5
        for sample in (value, peer):
            assert 0.95 * bound < sample.abs().max() <= bound
            assert sample.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert abs(sample.mean().item()) < 0.1 * bound


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    def draw(plan: LoRAPlan, seed: int) -> dict[str, Any]:
        model = Qwen2(small_spec(), device="meta")
        add_lora(model, plan, dtype=torch.bfloat16)
        return dict(initial_factors(model, seed))

    few = LoRAPlan(rank=4, alpha=1.0, targets=("v_proj",), quantize="nf4")
    first, second, other = draw(PLAN, 3), draw(few, 3), draw(PLAN, 4)
    assert all(torch.equal(first[name], value) for name, value in second.items())
    a_names = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in a_names)
    assert len({first[name].sum().item() for name in a_names}) == len(a_names)


@pytest.mark.parametrize("rslora", [False, True])
def test_twenty_steps_are_those_of_peft(rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    spec = small_spec()
    plan = LoRAPlan(rank=4, alpha=8.0, targets=TARGETS, rslora=rslora)
    model = network(spec, plan)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(TARGETS), use_rslora=rslora, task_type="CAUSAL_LM"
    )
    peer = peft.get_peft_model(theirs(spec), config)
    start = {f"base_model.model.{n}": v for n, v in initial_factors(model, plan.seed)}
    peft.set_peft_model_state_dict(peer, start)

    def losses(module: Any, forward: Any) -> list[float]:
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.1, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(20):
            rows = torch.randint(0, spec.vocab_size, (2, 24), generator=generator) // 8
            loss = mean_loss(forward(rows), rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    mine, expected = losses(model, model), losses(peer, lambda rows: peer(rows).logits)
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5)
    assert mine[-1] < mine[0] - 0.5
    base = random_weights(spec)
    for name, tensor in ((n, p) for n, p in model.named_parameters() if not p.requires_grad):
        assert np.array_equal(tensor.numpy(), base.read(name).float32())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["compiled", "recomputed"])
def test_compiled_and_recomputed_layers_do_the_same(how: str, dtype: Any, quantize: Any) -> None:
    plan = LoRAPlan(rank=4, alpha=8.0, targets=TARGETS[:4], quantize=quantize)

    def gradients(change: Any) -> tuple[Any, dict[str, Any]]:
        model = network(small_spec(), plan, dtype=dtype, random_b=True)
        for layer in model.model.layers:
            change(layer)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(ROWS)
        loss = mean_loss(logits.float(), ROWS)
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters()}
        assert all((g is not None) == ("lora_" in n) for n, g in found.items())
        return loss, {n: g for n, g in found.items() if g is not None}

    def compiled(layer: Any) -> None:
        torch._dynamo.reset()
        layer.compile(fullgraph=True, backend="aot_eager")

    def recomputed(layer: Any) -> None:
        checkpoint = torch.utils.checkpoint.checkpoint
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    loss, plain = gradients(lambda layer: None)
    other, changed = gradients(compiled if how == "compiled" else recomputed)
    exact = {"rtol": 0.0, "atol": 0.0} if how == "recomputed" else {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(other, loss, **exact)
    for name, gradient in plain.items():
        torch.testing.assert_close(changed[name], gradient, **exact)


def test_dropout_is_a_function_of_seed_step_and_rank() -> None:
    spec = small_spec()
    plan = LoRAPlan(rank=4, alpha=8.0, targets=TARGETS, dropout=0.4, seed=7)

    def run(plan: LoRAPlan, step: int, rank: int = 0, noise: int = 0) -> Any:
        model = network(spec, plan, random_b=True)
        torch.manual_seed(noise)  # whatever else drew random numbers before
        before = torch.get_rng_state()
        with dropout(model, plan, step=step, rank=rank):
            logits = model(ROWS)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(model(ROWS), network(spec, plan, random_b=True)(ROWS))
        return logits

    first = run(plan, 11)
    assert torch.equal(run(plan, 11, noise=99), first)
    assert not torch.equal(run(plan, 12), first)
    assert not torch.equal(run(plan, 11, rank=1), first)
    without = LoRAPlan(rank=4, alpha=8.0, targets=TARGETS, seed=7)
    assert torch.equal(run(without, 11), run(without, 12))


def test_dropout_drops_the_adapters_input_only_and_keeps_its_mean() -> None:
    plan = LoRAPlan(rank=4, alpha=8.0, targets=("q_proj",), dropout=0.25)
    model = network(small_spec(), plan, random_b=True)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.ones(4000, layer.in_features)
    plain = layer(x)
    base = FrozenLinear.forward(layer, x)
    with dropout(model, plan, step=0):
        noisy = layer(x)
    torch.testing.assert_close((noisy - base).mean(0), (plain - base).mean(0), rtol=0, atol=2e-2)
    assert (noisy - base).std(0).min() > 1e-3
    kept = torch.nn.functional.linear(x.new_zeros(1, layer.in_features), layer.weight, layer.bias)
    with dropout(model, plan, step=0):
        torch.testing.assert_close(layer(torch.zeros(1, layer.in_features)), kept)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_it_generates_between_steps_and_trains_on(quantize: Any) -> None:
    """In a bfloat16 run the frozen matrices are bfloat16, embedding and norms are not."""
    from qwen2kit_torch.engine.eager import EagerSlots

    plan = LoRAPlan(rank=4, alpha=8.0, targets=("q_proj", "up_proj"), quantize=quantize)
    model = network(small_spec(tied=False), plan, dtype=torch.bfloat16, random_b=True)
    slots = EagerSlots(model, count=1, capacity=64)
    slots.feed([Feed(0, 0, tuple(TOKENS[:-1]), 0)])
    run = slots.run_greedy([Feed(0, len(TOKENS) - 1, (TOKENS[-1],))], None)
    found = [next(run)[0] for _ in range(4)]
    slots.close()
    with torch.inference_mode():
        best = int(model(torch.tensor([TOKENS]))[0, -1].argmax())
    assert found[0] == best
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ROWS)
    assert logits.dtype == torch.bfloat16
    mean_loss(logits.float(), ROWS).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_loaded_model_can_be_given_adapters() -> None:
    spec = small_spec()
    model = ours(spec).module
    expected = model(ROWS)
    add_lora(model, PLAN, dtype=torch.float32)
    load_factors(model, initial_factors(model, 0))
    assert torch.equal(model(ROWS), expected)
    assert not any(type(layer) is Linear for layer in model.modules())


def test_stored_tensors_of_a_dense_and_of_a_packed_matrix() -> None:
    plan = LoRAPlan(rank=2, alpha=1.0, targets=("q_proj",), quantize="nf4")
    model = network(small_spec(tied=False), plan)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    kinds = set()
    for name, tensor in export_weights(ours(small_spec(tied=False)).module):
        dense = torch.tensor(tensor.float32())
        stored = dict(stored_tensors(model, name, dense))
        assert {n: tuple(t.shape) for n, t in stored.items()} == {n: shapes[n] for n in stored}
        kinds.add(tuple(sorted(str(t.dtype) for t in stored.values())))
        packed = any(t.dtype == torch.uint8 for t in stored.values())
        assert packed == (name.endswith("_proj.weight"))
    assert kinds == {("torch.float32",), ("torch.float32", "torch.uint8")}


def test_refusals() -> None:
    spec = small_spec()
    with pytest.raises(BackendError, match="no layer is named proj"):
        add_lora(Qwen2(spec), LoRAPlan(rank=2, alpha=1.0, targets=("proj",)), dtype=torch.float32)
    odd = small_spec(hidden_size=36, head_dim=2, intermediate_size=36)
    nf4 = LoRAPlan(rank=2, alpha=1.0, targets=("q_proj",), quantize="nf4")
    with pytest.raises(BackendError, match="does not divide into NF4 blocks of 64"):
        add_lora(Qwen2(odd, device="meta"), nf4, dtype=torch.float32)


def test_host_tensors_are_copies_of_the_current_values() -> None:
    model = network(small_spec(), random_b=True)
    factors: dict[str, HostTensor] = dict(export_factors(model))
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(factors) == list(state)
    for name, tensor in factors.items():
        assert np.array_equal(tensor.float32(), state[name].detach().numpy())
