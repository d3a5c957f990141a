"""Both of our backends pass the whole suite; what they announce decides what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from qwen2kit.backend.conformance import CASES, Case
from qwen2kit.backend.registry import get, installed


def _present(name: str) -> bool:
    return find_spec(name) is not None and name in installed()


def _pairs() -> list[object]:
    """One parameter per backend and case that applies to it; one skip per absent backend."""
    pairs: list[object] = []
    for name in ("torch", "mlx"):
        if not _present(name):
            reason = pytest.mark.skip(reason=f"{name} is not installed")
            pairs.append(pytest.param(name, None, id=name, marks=reason))
            continue
        backend = get(name)
        pairs += [
            pytest.param(name, case, id=f"{name}-{case.name}")
            for case in CASES
            if case.applies(backend)
        ]
    return pairs


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads when the machine is shared."""
    if not _present("torch"):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "case"), _pairs())
def test_backend_conforms(name: str, case: Case) -> None:
    case.run(get(name))


@pytest.mark.parametrize(("name", "trains"), [("torch", True), ("mlx", False)])
def test_announced_capabilities(name: str, trains: bool) -> None:
    if not _present(name):
        pytest.skip(f"{name} is not installed")
    capabilities = get(name).capabilities()
    assert capabilities.trains is trains
    assert capabilities.sliding_window
    if name == "mlx":
        assert set(capabilities.quantized_bits) >= {4, 8}
