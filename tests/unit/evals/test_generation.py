"""When prompts start, and that all of them are answered whatever the number of places."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2kit.generate.sampling import Sampling
from qwen2kit_evals.generation import Asked, Decoding, _to_start, continue_all
from tests.unit.evals.reference_lm import load_reference


def test_prompts_start_together_rather_than_one_by_one() -> None:
    assert _to_start(waiting=1000, free=256, together=256) == 256
    assert _to_start(waiting=1000, free=31, together=256) == 0
    assert _to_start(waiting=1000, free=32, together=256) == 32
    assert _to_start(waiting=5, free=5, together=256) == 5  # nothing else will come
    assert _to_start(waiting=5, free=4, together=256) == 0
    assert _to_start(waiting=3, free=1, together=4) == 1
    assert _to_start(waiting=0, free=256, together=256) == 0


@pytest.mark.parametrize("together", [1, 3, 16, 40])
def test_answers_do_not_depend_on_the_number_of_places(tiny: Path, together: int) -> None:
    loaded = load_reference(tiny)
    asked = [
        Asked((5, 6, n % 7, n), Decoding(Sampling(max_new_tokens=1 + n % 4, seed=3), ()), stream=n)
        for n in range(20)
    ]
    alone = [text for item in asked for _, text in continue_all(loaded, [item], together=1)]
    found = list(continue_all(loaded, asked, together=together))
    assert sorted(index for index, _ in found) == list(range(20))
    assert [text for _, text in sorted(found)] == alone
