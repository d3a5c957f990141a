"""Decoding with the cache against decoding without one, and batches against single prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit.backend.protocol import TokenEvent  # noqa: E402
from qwen2kit.engine.generate import generate  # noqa: E402
from qwen2kit.errors import BackendError  # noqa: E402
from qwen2kit.generate.sampling import Sampling  # noqa: E402
from qwen2kit.spec.model import ModelSpec  # noqa: E402
from qwen2kit.spec.reference import ReferenceModel  # noqa: E402
from qwen2kit_mlx.compiled import MLXModel  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.unit.mlx.setup_mlx import KERNELS, SPECS, model  # noqa: E402

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, 199, n).tolist() for n in (3, 11, 1, 7)]


def texts(events: Sequence[TokenEvent], prompts: int) -> list[list[int]]:
    return [[e.token for e in events if e.prompt == index] for index in range(prompts)]


def by_reference(spec: ModelSpec, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by the float64 model, everything recomputed at every step."""
    reference, tokens = ReferenceModel(spec, random_weights(spec)), list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(reference.logits(tokens)[-1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["tied", "untied", "yarn", "window"])
def test_ragged_batch_equals_the_reference(name: str, kernels: str) -> None:
    spec = SPECS[name]
    ours = model(spec, random_weights(spec), kernels)
    events = list(generate(ours, PROMPTS, Sampling(max_new_tokens=9)))
    assert texts(events, 4) == [by_reference(spec, prompt, 9) for prompt in PROMPTS]
    last = {event.prompt: event.finish_reason for event in events}
    assert last == dict.fromkeys(range(4), "length")
    assert sum(event.finish_reason is not None for event in events) == 4


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stopping_rows_leave_the_others_alone(kernels: str, temperature: float) -> None:
    """Rows end at different steps; each row's text is that of a batch of one."""
    spec = SPECS["window"]
    ours = model(spec, random_weights(spec), kernels)
    free = Sampling(max_new_tokens=30, temperature=temperature, seed=3)
    plain = texts(list(generate(ours, PROMPTS, free)), 4)
    stops = (plain[0][4], plain[1][11], plain[3][2])
    sampling = Sampling(max_new_tokens=30, temperature=temperature, seed=3, stop_token_ids=stops)
    batch = texts(list(generate(ours, PROMPTS, sampling)), 4)
    for row, tokens in enumerate(batch):
        ends = [plain[row].index(s) for s in stops if s in plain[row]]
        assert tokens == plain[row][: min(ends, default=29) + 1]
    if temperature == 0:
        single = [texts(list(generate(ours, [p], sampling)), 1)[0] for p in PROMPTS]
        assert single == batch


def test_prefill_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["window"]
    ours = model(spec, random_weights(spec))
    expected = list(generate(ours, PROMPTS, Sampling(max_new_tokens=5)))
    monkeypatch.setattr("qwen2kit_mlx.passes.PREFILL_TOKENS", 3)
    monkeypatch.setattr("qwen2kit_mlx.passes.SHORT", 2)
    assert list(generate(ours, PROMPTS, Sampling(max_new_tokens=5))) == expected


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_cache_grows(kernels: str) -> None:
    """More tokens than one cache block, against one pass over the finished sequence."""
    spec = small_spec(max_position_embeddings=600)
    ours = model(spec, random_weights(spec), kernels)
    prompt = RNG.integers(0, 199, 250).tolist()
    (text,) = texts(list(generate(ours, [prompt], Sampling(max_new_tokens=290))), 1)
    logits = ours.logits([*prompt, *text[:-1]])[249:]
    chosen = logits[np.arange(290), text]
    assert (chosen >= logits.max(axis=-1) - 1e-4).all()


def test_sampling_depends_on_the_seed_only() -> None:
    spec = SPECS["tied"]
    ours = model(spec, random_weights(spec))

    def draw(seed: int) -> list[TokenEvent]:
        sampling = Sampling(max_new_tokens=12, temperature=0.9, top_k=50, top_p=0.95, seed=seed,
                            repetition_penalty=1.1, logprobs=True)  # fmt: skip
        return list(generate(ours, PROMPTS, sampling))

    first = draw(1)
    assert first == draw(1)
    assert first != draw(2)
    rows = [e for e in first if e.prompt == 1]
    logits = ReferenceModel(spec, random_weights(spec)).logits(
        [*PROMPTS[1], *(e.token for e in rows)]
    )
    for step, event in enumerate(rows):
        row = logits[len(PROMPTS[1]) - 1 + step]
        expected = row[event.token] - np.logaddexp.reduce(row)
        assert event.logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_padding_ids_are_never_produced(temperature: float) -> None:
    spec = SPECS["tied"]
    ours = model(spec, random_weights(spec))
    sampling = Sampling(max_new_tokens=20, temperature=temperature, vocab_limit=7)
    assert all(event.token < 7 for event in generate(ours, PROMPTS, sampling))


def test_generation_ends_at_the_last_position() -> None:
    spec = small_spec(max_position_embeddings=12)
    ours = model(spec, random_weights(spec))
    events = list(generate(ours, [[1] * 12, [1] * 9], Sampling(max_new_tokens=50)))
    assert [len(text) for text in texts(events, 2)] == [1, 3]
    assert all(e.finish_reason == "length" for e in events if e.finish_reason)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * 257, "takes 256"), ([199], "vocabulary of 199"), ([-1], "token id -1")],
)
def test_bad_prompts_are_refused_at_once(prompt: list[int], message: str) -> None:
    ours = model(SPECS["tied"], random_weights(SPECS["tied"]))
    with pytest.raises(BackendError, match=message):
        generate(ours, [[1], prompt], Sampling())
    with pytest.raises(BackendError, match=message):
        ours.logits(prompt)


@pytest.mark.parametrize("kernels", KERNELS)
def test_closing_early_frees_the_cache(kernels: str) -> None:
    ours: MLXModel = model(SPECS["tied"], random_weights(SPECS["tied"]), kernels)
    before = mx.get_active_memory()
    stream = generate(ours, PROMPTS * 8, Sampling(max_new_tokens=100))
    next(stream)
    next(stream)
    during = mx.get_active_memory()
    assert during > before + 500_000
    stream.close()  # type: ignore[attr-defined]
    mx.synchronize()
    assert mx.get_active_memory() - before < (during - before) / 3


def test_no_prompts_give_no_events() -> None:
    ours = model(SPECS["tied"], random_weights(SPECS["tied"]))
    assert list(generate(ours, [], Sampling())) == []
