"""Guessing changes nothing but the speed: every drafter, on models that forgive nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen2kit.backend.loading import LoadedModel, load_model
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.registry import installed
from qwen2kit.backend.slots import Feed
from qwen2kit.engine.constraint import ConstraintCompiler
from qwen2kit.engine.draft_model import DraftModel, check_same_tokenizer
from qwen2kit.engine.drafting import Drafter
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.host_logits import HostLogits
from qwen2kit.engine.jump_ahead import JumpAhead
from qwen2kit.engine.prompt_lookup import PromptLookup
from qwen2kit.engine.request import Request
from qwen2kit.engine.stats import EngineStats
from qwen2kit.errors import ConfigError
from qwen2kit.generate.sampling import Sampling
from qwen2kit.tokenizer.train_bbpe import train_bbpe
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.unit.engine.hash_model import VOCAB, EveryThird, HashModel, WatchedSlots, alone

CAPACITY = 40
SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=20),
    "sampled": Sampling(max_new_tokens=20, temperature=0.8, top_p=0.9, seed=5),
    "penalties": Sampling(
        max_new_tokens=20, temperature=0.7, seed=2, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, logit_bias=((7, 2.0),),
    ),
    "greedy penalties": Sampling(max_new_tokens=20, repetition_penalty=1.3),
    "stops": Sampling(max_new_tokens=20, temperature=1.0, stop_token_ids=tuple(range(0, 80, 9))),
}  # fmt: skip


class Noisy(HashModel):
    """Nearly the same opinions, and a few more ids."""

    def __init__(self, noise: float, more: int = 0) -> None:
        super().__init__()
        self.noise = noise
        self.spec = replace(self.spec, vocab_size=VOCAB + more)
        self.more = more

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        rows = super().logits(tokens)
        random = np.random.default_rng(sum(tokens))
        rows = rows + self.noise * random.standard_normal(rows.shape).astype(np.float32)
        extra = np.full((len(rows), self.more), rows.max() - 0.5, np.float32)
        return np.concatenate([rows, extra], axis=1)


class Fragile(Noisy):
    """Says NaN to every text with the token 9 in it; NaN stays in a slot until that is cleared,
    and is felt by whatever is fed beside it."""

    def slots(self, count: int, capacity: int) -> FragileSlots:
        self.given.append(FragileSlots(self, count, capacity))
        return self.given[-1]  # type: ignore[return-value]


class FragileSlots(WatchedSlots):
    """Slots of a `Fragile` model."""

    def __init__(self, model: HashModel, count: int, capacity: int) -> None:
        super().__init__(model, count, capacity)
        self.spoilt: set[int] = set()

    def feed(self, feeds: Sequence[Feed]) -> HostLogits:
        logits = super().feed(feeds)
        self.spoilt |= {feed.slot for feed in feeds if 9 in self._held[feed.slot]}
        if not self.spoilt:
            return logits
        rows = sum(feed.wanted for feed in feeds)
        return HostLogits(np.full((rows, VOCAB), np.nan, np.float32))

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.spoilt.discard(slot)


def _requests(sampling: Sampling, constrained: bool = False) -> list[Request]:
    prompts = [(5, 6, 7, 5, 6), (5, 6, 7, 5, 6, 9), (1,), (60, 61) * 8, (3, 4, 3, 4, 3)]
    return [
        Request(prompt, sampling, index, EveryThird(index % 3, 12) if constrained else None)
        for index, prompt in enumerate(prompts)
    ]


def _run(
    engine: Engine, requests: list[Request]
) -> tuple[list[list[tuple[int, str | None]]], EngineStats]:
    with engine:
        keys = [engine.submit(request) for request in requests]
        found: dict[int, list[tuple[int, str | None]]] = {key: [] for key in keys}
        while engine.busy:
            for event in engine.step():
                found[event.prompt].append((event.token, event.finish_reason))
    return [found[key] for key in keys], engine.stats


def _draft_model(noise: float, more: int = 0, slots: int = 3) -> Callable[[HashModel], Drafter]:
    return lambda target: DraftModel(
        Noisy(noise, more),  # type: ignore[arg-type]
        target,  # type: ignore[arg-type]
        slots=slots,
        capacity=CAPACITY - 6,
        longest=5,
        cost=0.1,
    )


def _fragile(target: HashModel) -> DraftModel:
    return DraftModel(
        Fragile(0.0),  # type: ignore[arg-type]
        target,  # type: ignore[arg-type]
        slots=3,
        capacity=CAPACITY,
        longest=5,
        cost=0.1,
    )


DRAFTERS: dict[str, Callable[[HashModel], Drafter]] = {
    "lookup": lambda _: PromptLookup(6, shortest_match=1),
    "perfect": _draft_model(0.0),
    "noisy": _draft_model(0.7),
    "one slot": _draft_model(0.3, slots=1),
    "larger vocabulary": _draft_model(0.2, more=8),
    "fragile": _fragile,
    "jump": lambda _: JumpAhead(PromptLookup(4, shortest_match=1)),
}


@pytest.mark.parametrize("constrained", [False, True], ids=["free", "constrained"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
def test_output_is_that_without_drafts(
    drafter: Callable[[HashModel], Drafter], sampling: Sampling, constrained: bool
) -> None:
    model = HashModel()
    engine = Engine(
        model,  # type: ignore[arg-type]
        slots=3,
        capacity=CAPACITY,
        prefill_tokens=6,
        drafter=drafter(model),
    )
    found, _ = _run(engine, _requests(sampling, constrained))
    for tokens, request in zip(found, _requests(sampling, constrained), strict=True):
        expected = alone(model, request, CAPACITY - len(request.prompt))
        assert tokens == [(drawn.token, reason) for drawn, reason in expected]


@pytest.mark.parametrize("sampling", [SAMPLINGS[n] for n in ("greedy", "sampled", "penalties")])
def test_the_same_model_guesses_everything(sampling: Sampling) -> None:
    """Only if it draws with the request's own random numbers, penalties and all."""
    model = HashModel()
    drafter = _draft_model(0.0, slots=5)(model)
    engine = Engine(model, slots=5, capacity=CAPACITY, drafter=drafter)  # type: ignore[arg-type]
    _, stats = _run(engine, _requests(sampling))
    assert stats.accepted == stats.drafted > 20
    assert stats.steps < stats.generated_tokens / 2


@pytest.mark.parametrize("sampling", [SAMPLINGS[n] for n in ("greedy", "sampled")])
def test_nan_of_the_small_model_ends_guessing_for_its_own_request(sampling: Sampling) -> None:
    model = HashModel()
    drafter = _fragile(model)
    slots = drafter._slots
    assert isinstance(slots, FragileSlots)
    prompts = [(5, 9, 7), (5, 6, 8), (1, 2), (9,), (4,)]
    requests = [Request(prompt, sampling, index) for index, prompt in enumerate(prompts)]
    engine = Engine(model, slots=1, capacity=CAPACITY, drafter=drafter)  # type: ignore[arg-type]
    found, stats = _run(engine, requests)
    for tokens, request in zip(found, requests, strict=True):
        expected = alone(model, request, CAPACITY - len(request.prompt))
        assert tokens == [(drawn.token, reason) for drawn, reason in expected]
    assert stats.accepted > 10
    assert not slots.spoilt
    fed = [feed for feeds in slots.fed for feed in feeds]
    assert sum(9 in feed.tokens for feed in fed) <= len(prompts)


def test_a_similar_model_is_right_more_often_with_the_same_random_numbers() -> None:
    class Careless(DraftModel):
        def propose(self, sequences):  # type: ignore[no-untyped-def]
            other = [item.sampler.fork() for item in sequences]
            for sampler in other:
                sampler._drawn += 1000
            return super().propose(
                [item._replace(sampler=s) for item, s in zip(sequences, other, strict=True)]
            )

    rates = []
    for kind in (DraftModel, Careless):
        model, right, tried = HashModel(), 0, 0
        for seed in range(12):
            sampling = Sampling(max_new_tokens=20, temperature=1.5, seed=seed)
            draft = kind(Noisy(0.3), model, slots=5, capacity=CAPACITY, cost=0.1)  # type: ignore[arg-type]
            engine = Engine(model, slots=5, capacity=CAPACITY, drafter=draft)  # type: ignore[arg-type]
            _, stats = _run(engine, _requests(sampling))
            right, tried = right + stats.accepted, tried + stats.drafted
        rates.append(right / tried)
    assert rates[0] > 1.5 * rates[1]


def test_ids_the_target_lacks_are_never_fed() -> None:
    """The draft model likes its extra ids best; guesses end before them."""
    model, draft = HashModel(), Noisy(0.0, more=8)
    drafter = DraftModel(draft, model, slots=5, capacity=CAPACITY, cost=0.1)  # type: ignore[arg-type]
    engine = Engine(model, slots=5, capacity=CAPACITY, drafter=drafter)  # type: ignore[arg-type]
    _, stats = _run(engine, _requests(SAMPLINGS["sampled"]))
    fed = [token for feeds in model.given[0].fed for feed in feeds for token in feed.tokens]
    assert max(fed) < VOCAB
    assert stats.drafted > 0


def test_ids_the_draft_lacks_stop_it_and_nothing_else() -> None:
    model = Noisy(0.0, more=8)
    drafter = DraftModel(HashModel(), model, slots=2, capacity=CAPACITY, cost=0.1)  # type: ignore[arg-type]
    engine = Engine(model, slots=2, capacity=CAPACITY, drafter=drafter)  # type: ignore[arg-type]
    sampling = Sampling(max_new_tokens=9, vocab_limit=VOCAB)
    requests = [Request((VOCAB + 3, 5), sampling), Request((3, 5), sampling, 1)]
    found, stats = _run(engine, requests)
    for tokens, request in zip(found, requests, strict=True):
        assert [token for token, _ in tokens] == [d.token for d, _ in alone(model, request, 38)]
    assert stats.drafted > 0


def test_turns_of_a_chat_are_read_once_by_the_draft_model() -> None:
    target, draft = HashModel(), HashModel()
    drafter = DraftModel(draft, target, slots=1, capacity=90, cost=0.1)  # type: ignore[arg-type]
    sampling = Sampling(max_new_tokens=6)
    with Engine(target, slots=1, capacity=90, drafter=drafter) as engine:  # type: ignore[arg-type]
        tokens = tuple(range(40))
        for _ in range(2):
            engine.submit(Request(tokens, sampling))
            while engine.busy:
                tokens += tuple(event.token for event in engine.step())
    (slots,) = draft.given
    assert sum(len(feed.tokens) for feeds in slots.fed for feed in feeds) < 60


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write_tiny_checkpoint(path / "large")
    write_tiny_checkpoint(path / "small", seed=1, num_hidden_layers=1, vocab_size=300)
    return path


@pytest.mark.parametrize("name", ["torch", "mlx"])
@pytest.mark.parametrize("how", ["greedy", "sampled", "penalties", "json"])
def test_real_backends(model_dir: Path, name: str, how: str) -> None:
    if name not in installed():
        pytest.skip(f"{name} is not installed")
    plan = ExecutionPlan(dtype="float32")
    large = load_model(model_dir / "large", backend=name, plan=plan)
    small = load_model(model_dir / "small", backend=name, plan=plan)
    check_same_tokenizer(small.tokenizer, large.tokenizer)
    drafters: list[Drafter | None] = [
        None,
        PromptLookup(5, shortest_match=1),
        DraftModel(large.model, large.model, slots=2, capacity=120, cost=0.1),
        JumpAhead(DraftModel(small.model, large.model, slots=1, capacity=120, cost=0.1)),
    ]
    results = [_on_backend(large, drafter, how) for drafter in drafters]
    assert all(found == results[0][0] for found, _ in results)
    assert results[1][1].drafted > 0
    if how != "json":  # the draft model does not see the grammar
        assert results[2][1].accepted == results[2][1].drafted > 20
    else:
        assert results[3][1].accepted > 5


def _on_backend(
    loaded: LoadedModel, drafter: Drafter | None, how: str
) -> tuple[list[list[tuple[int, str | None]]], EngineStats]:
    sampling = loaded.sampling(max_new_tokens=30, stop_token_ids=(), temperature=0.0)
    if how != "greedy":
        sampling = replace(sampling, temperature=0.9, top_p=0.95, seed=3)
    if how == "penalties":
        sampling = replace(sampling, repetition_penalty=1.2, frequency_penalty=0.1)
    compiler = None
    if how == "json":
        pytest.importorskip("llguidance")
        tokenizer = loaded.tokenizer
        vocab = loaded.checkpoint.spec.vocab_size
        compiler = ConstraintCompiler(tokenizer, vocab, [tokenizer.im_end_id])
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["the cat", "the dog"]}, "count": {"const": 12}},
        "required": ["answer", "count"],
    }
    requests = [
        Request(
            tuple(loaded.tokenizer.encode(text)),
            sampling,
            index,
            None if compiler is None else compiler.json_schema(schema),
        )
        for index, text in enumerate(["the cat sat on the cat sat", "one two one two one"])
    ]
    return _run(Engine(loaded.model, slots=2, capacity=120, drafter=drafter), requests)


def test_another_tokenizer_is_refused(model_dir: Path) -> None:
    from qwen2kit.tokenizer.bpe import Tokenizer

    ours = Tokenizer.from_dir(model_dir / "large")
    check_same_tokenizer(Tokenizer.from_dir(model_dir / "small"), ours)
    with pytest.raises(ConfigError, match="smaller model of the same release"):
        check_same_tokenizer(train_bbpe(["other words, other merges"] * 9, 270), ours)
