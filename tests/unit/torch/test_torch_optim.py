"""Steps that the device itself clips or leaves out, against torch's own clipping and AdamW."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from qwen2kit.backend.plan import AdamWPlan

torch = pytest.importorskip("torch")

PLAN = AdamWPlan(weight_decay=0.1, max_grad_norm=1.0)


def parameters() -> dict[str, Any]:
    """A matrix and a vector with gradients of norm 5."""
    torch.manual_seed(0)
    found = {name: torch.nn.Parameter(torch.randn(s)) for name, s in (("w", (3, 4)), ("b", (4,)))}
    new_gradients(found)
    return found


def new_gradients(found: dict[str, Any], norm: float = 5.0) -> None:
    gradients = [torch.randn_like(p) for p in found.values()]
    size = torch.nn.utils.get_total_norm(gradients)
    for parameter, gradient in zip(found.values(), gradients, strict=True):
        parameter.grad = gradient * (norm / size)


def step(optimizer: Any, found: dict[str, Any], loss: float = 2.0, **limits: float) -> list[float]:
    from qwen2kit_torch.train.optim import global_norm, guarded_step

    settings: dict[str, float] = {"max_norm": 1.0, "max_loss": inf} | limits
    norm = global_norm(found.values())
    return guarded_step(optimizer, 1e-2, loss=torch.tensor(loss), norm=norm, **settings).tolist()


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 50.0])
def test_steps_are_those_of_torch(max_norm: float) -> None:
    from qwen2kit_torch.train.optim import build_adamw

    ours, theirs = parameters(), parameters()
    optimizer = build_adamw(ours, PLAN)
    options = {"lr": 1e-2, "betas": PLAN.betas, "eps": PLAN.eps}
    groups = [
        {"params": [theirs["w"]], "weight_decay": 0.1},
        {"params": [theirs["b"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, **options)
    for number in range(5):
        torch.manual_seed(number)
        new_gradients(ours)
        torch.manual_seed(number)
        new_gradients(theirs)
        loss, norm, taken = step(optimizer, ours, max_norm=max_norm)
        expected = float(torch.nn.utils.get_total_norm([p.grad for p in theirs.values()]))
        if max_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
        reference.step()
        assert (loss, taken) == (2.0, 1.0)
        assert norm == pytest.approx(expected)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "bad", [{"loss": nan}, {"loss": inf}, {"loss": 3.0, "max_loss": 2.5}, {"gradient": inf}]
)
def test_a_bad_step_leaves_no_trace(bad: dict[str, float]) -> None:
    from qwen2kit_torch.train.optim import build_adamw

    found, other = parameters(), parameters()
    optimizer, same = build_adamw(found, PLAN), build_adamw(other, PLAN)
    step(optimizer, found)
    step(same, other)
    torch.manual_seed(1)
    new_gradients(found)
    if "gradient" in bad:
        found["w"].grad[0, 0] = bad["gradient"]
    limits = {key: value for key, value in bad.items() if key != "gradient"}
    assert step(optimizer, found, **limits)[2] == 0.0
    torch.manual_seed(2)
    new_gradients(found)
    torch.manual_seed(2)
    new_gradients(other)
    assert step(optimizer, found)[2] == step(same, other)[2] == 1.0
    for name, parameter in found.items():
        assert torch.equal(parameter, other[name])
        ours, theirs = optimizer.state[parameter], same.state[other[name]]
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_a_first_step_left_out_is_as_if_it_had_not_been() -> None:
    from qwen2kit_torch.train.optim import build_adamw

    found, other = parameters(), parameters()
    optimizer, same = build_adamw(found, PLAN), build_adamw(other, PLAN)
    assert step(optimizer, found, loss=nan)[2] == 0.0
    step(optimizer, found)
    new = parameters()
    for name, parameter in other.items():
        parameter.grad = new[name].grad
    step(same, other)
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, other[name], rtol=0, atol=0)
