"""The kernels that draw, run by Triton's interpreter (`test_torch_interpreted`)."""

from __future__ import annotations

import pytest

from qwen2kit import Sampling
from qwen2kit.generate.sampling import Sampler
from tests.conftest import small_spec

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from qwen2kit_torch.engine.drawn_logits import DrawnLogits  # noqa: E402
from tests.unit.torch import draw_checks  # noqa: E402
from tests.unit.torch.peers import ours  # noqa: E402
from tests.unit.torch.stepped import Stepped  # noqa: E402


@pytest.mark.parametrize(("grid", "scale"), [(0.0, 2.0), (8.0, 20.0), (0.0, 60.0)])
def test_the_samplers_tokens(grid: float, scale: float) -> None:
    draw_checks.check_tokens(DrawnLogits, grid, scale, repeats=1, steps=3)


def test_other_dtypes() -> None:
    draw_checks.check_unlike_dtypes(DrawnLogits)


def test_rows_of_several_parts() -> None:
    draw_checks.check_large_vocabulary(DrawnLogits, 3, 9000)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_step_draws_its_own_tokens(rows: int) -> None:
    """Every kind of request, from what the step itself computed, with what was said before."""
    model = ours(small_spec(num_hidden_layers=1))
    slots = Stepped(model, rows, 40, rows, draws=True)
    tail = slots.step.tail
    assert tail is not None
    kinds = [kind for kind in draw_checks.KINDS if "logit_bias" not in kind][-min(rows, 7) :]
    samplers = []
    for seed, kind in enumerate(kinds):
        sampling = Sampling(seed=seed, **{"presence_penalty": 0.4, **kind})
        samplers.append(Sampler(sampling, [3, 17, 5], 1))
        for token in (9, 9, 41):
            samplers[-1].accept(token)
    tail.set([sampler.course() for sampler in samplers])
    tail.set_points(0)
    slots.run([(7, row, 0) for row in range(len(samplers))])
    for position in range(1, 6):
        logits = slots.step.logits[: len(samplers)].numpy()
        drawn = [sampler.draw(row).token for sampler, row in zip(samplers, logits, strict=True)]
        token, _, moved = slots.step.rows[:, : len(samplers)].tolist()
        assert token == drawn
        assert moved == [position] * len(samplers)
        with torch.inference_mode():
            assert slots.step.history[position - 1, : len(samplers)].tolist() == drawn
            slots.step.run()


def test_broken_rows_are_told() -> None:
    draw_checks.check_broken(DrawnLogits)
