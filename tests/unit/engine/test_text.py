"""TextEngine: the pieces join to what the tokenizer decodes; stop strings end requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.backend.protocol import LoadReport
from qwen2kit.engine.text import TextEngine
from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.generate.sampling import Sampling
from qwen2kit.weights.checkpoint import open_checkpoint
from tests.scripted_model import ScriptedModel
from tests.tiny_checkpoint import write_tiny_checkpoint

ANSWERS = {"a": "the cat 猫 🐈 sat", "b": "one two three", "c": "0123456789 end"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that answers each prompt of one letter as `ANSWERS` says."""
    path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(path)
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.tokenizer()

    def answer(prompt: tuple[int, ...]) -> Sequence[int]:
        text = ANSWERS[tokenizer.decode(list(prompt))[-1]]
        return [*tokenizer.encode(text), tokenizer.im_end_id]

    model: Any = ScriptedModel(checkpoint.spec, answer)
    backend: Any = None
    return LoadedModel(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        backend=backend,
        model=model,
        report=LoadReport(tensors=0, bytes=0, seconds=0.0),
    )


def finish(engine: TextEngine) -> dict[int, tuple[str, list[int], str | None]]:
    """Text, tokens and finish reason of every request."""
    found: dict[int, tuple[str, list[int], str | None]] = {}
    while engine.busy:
        for event in engine.step():
            text, ids, reason = found.get(event.key, ("", [], None))
            assert reason is None
            assert event.tokens
            ids = [*ids, *(token.token for token in event.tokens)]
            found[event.key] = (text + event.text, ids, event.finish_reason)
    return found


def test_texts_and_stop_strings(loaded: LoadedModel) -> None:
    stops = {"a": (), "b": (" th", "zzz"), "c": ("6789 en", "45")}
    sampling = loaded.sampling(temperature=0.0, max_new_tokens=100)
    with TextEngine(loaded, slots=2, capacity=128) as engine:
        keys = {
            letter: engine.submit(loaded.tokenizer.encode(letter), sampling, stop=stop)
            for letter, stop in stops.items()
        }
        found = finish(engine)
    texts = {letter: found[key][0] for letter, key in keys.items()}
    assert texts == {"a": ANSWERS["a"], "b": "one two", "c": "0123"}
    assert {found[key][2] for key in keys.values()} == {"stop"}
    full = [*loaded.tokenizer.encode(ANSWERS["a"]), loaded.tokenizer.im_end_id]
    assert found[keys["a"]][1] == full
    said = loaded.tokenizer.decode(found[keys["c"]][1])
    assert "45" in said
    assert "45" not in loaded.tokenizer.decode(found[keys["c"]][1][:-1])
    assert not engine.busy


def test_length_gives_what_was_held_back(loaded: LoadedModel) -> None:
    """The beginning of a stop string that does not come, and half a character."""
    ids = loaded.tokenizer.encode(ANSWERS["a"])
    for count in range(1, len(ids) + 1):
        sampling = loaded.sampling(temperature=0.0, max_new_tokens=count)
        with TextEngine(loaded, slots=1, capacity=128) as engine:
            key = engine.submit(loaded.tokenizer.encode("a"), sampling, stop=("the cat x", "🐈!"))
            text, tokens, reason = finish(engine)[key]
        assert (text, reason) == (loaded.tokenizer.decode(ids[:count]), "length")
        assert tokens == ids[:count]


def test_cancelled_requests_say_nothing_more(loaded: LoadedModel) -> None:
    sampling = loaded.sampling(temperature=0.0)
    engine = TextEngine(loaded, slots=1, capacity=128)
    first, second, third = (
        engine.submit(loaded.tokenizer.encode(letter), sampling) for letter in "abc"
    )
    assert {event.key for event in engine.step()} == {first}
    assert (engine.running, engine.waiting) == (1, 2)
    engine.cancel(first)
    engine.cancel(second)
    engine.cancel(99)
    found = finish(engine)
    assert list(found) == [third]
    assert found[third][0] == ANSWERS["c"]
    assert engine.stats.generated_tokens == 1 + len(found[third][1])
    engine.close()
    engine.close()


def test_what_is_wrong_is_said_at_once(loaded: LoadedModel) -> None:
    with TextEngine(loaded, slots=1, capacity=16) as engine:
        with pytest.raises(ConfigError, match="stop string must not be empty"):
            engine.submit([1], Sampling(), stop=("x", ""))
        with pytest.raises(BackendError, match="has 17 tokens"):
            engine.submit([1] * 17, Sampling())
        assert not engine.busy


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_real_backends_say_what_generate_says(loaded: LoadedModel, backend: str) -> None:
    pytest.importorskip("torch" if backend == "torch" else "mlx.core")
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.backend.registry import get

    compiled = get(backend).compile(loaded.checkpoint.spec, ExecutionPlan(dtype="float32"))
    compiled.load(loaded.checkpoint.weights)
    real = replace(loaded, model=compiled)
    prompts = [loaded.tokenizer.encode(text) for text in ("the cat", "one two three 1 2 3", "x")]
    for sampling in (
        real.sampling(temperature=0.0, max_new_tokens=12),
        real.sampling(temperature=0.9, max_new_tokens=12, seed=4, frequency_penalty=0.4),
    ):
        expected: list[list[int]] = [[] for _ in prompts]
        for event in real.generate(prompts, sampling):
            expected[event.prompt].append(event.token)
        with TextEngine(real, slots=2, capacity=64, prefill_tokens=3) as engine:
            for stream, prompt in enumerate(prompts):
                engine.submit(prompt, sampling, stream=stream)
            found = finish(engine)
        assert [found[key][1] for key in sorted(found)] == expected
