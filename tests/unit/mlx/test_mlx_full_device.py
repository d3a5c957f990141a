"""A device that runs out of memory in the middle of a pass says so in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit.backend.protocol import ScoreRequest  # noqa: E402
from qwen2kit.backend.slots import Edit, Feed  # noqa: E402
from qwen2kit.engine.generate import generate  # noqa: E402
from qwen2kit.errors import BackendError  # noqa: E402
from qwen2kit.generate.sampling import Sampling  # noqa: E402
from qwen2kit_mlx.model import Decoder  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.unit.mlx.setup_mlx import model  # noqa: E402

# What MLX says on Metal (a buffer too large, a command buffer that failed), on CUDA, anywhere.
WORDS = (
    "[metal::malloc] Attempting to allocate 96905199616 bytes which is greater than the maximum "
    "allowed buffer size of 17179869184 bytes.",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "cudaMallocAsync(&buf->data, size, stream) failed: out of memory",
    "[malloc] Unable to allocate 4096 bytes.",
)


def _failing(words: str) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError(words)

    return fail


@pytest.fixture(scope="module")
def ours() -> Any:
    spec = small_spec()
    return model(spec, random_weights(spec))


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
@pytest.mark.parametrize("where", ["__call__", "logits"])
def test_generation(
    ours: Any, where: str, sampling: Sampling, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = generate(ours, [(1, 2, 3)], sampling)
    next(events)
    monkeypatch.setattr(Decoder, where, _failing(words))
    with pytest.raises(BackendError, match=r"^the device ran out of memory; use fewer slots.*$"):
        next(events)


def test_every_way_to_read_logits(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = ours.slots(1, 16)
    ways: list[Callable[[Any], object]] = [
        lambda logits: logits.greedy(None),
        lambda logits: logits.shortlist(2, [Edit()]),
        lambda logits: logits.rows([0]),
    ]
    monkeypatch.setattr(Decoder, "logits", _failing(WORDS[2]))
    for read in ways:
        logits = slots.feed([Feed(0, 0, (1, 2))])
        with pytest.raises(BackendError, match="the device ran out of memory"):
            read(logits)
    slots.close()


@pytest.mark.parametrize("words", WORDS)
def test_scoring(ours: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "__call__", _failing(words))
    with pytest.raises(BackendError, match=r"^the device ran out of memory; use shorter prompts"):
        list(ours.score([ScoreRequest((1, 2), (3,))]))


def test_other_failures_stay_what_they_are(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "__call__", _failing("[matmul] shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        next(generate(ours, [(1, 2, 3)], Sampling()))
