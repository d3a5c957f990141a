"""The adapter's own decisions; agreement with lm-eval's hf model is in tests/parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from qwen2kit.backend.protocol import ScoreRequest
from qwen2kit.errors import ConfigError, DataError, Qwen2KitError
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit_evals.harness import Qwen2KitLM
from tests.unit.evals.reference_lm import load_reference


def instance(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


class Spy:
    """Records the requests a model is asked to score."""

    def __init__(self, lm: Qwen2KitLM) -> None:
        self.requests: list[ScoreRequest] = []
        inner = lm.loaded.model.score

        def score(requests: Any) -> Any:
            self.requests += requests
            return inner(requests)

        lm.loaded.model.score = score  # type: ignore[method-assign]


class Hook:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.seen.append((kind, request, answer))


@pytest.fixture
def lm(tiny: Path) -> Qwen2KitLM:
    return Qwen2KitLM(load_reference(tiny))


def test_registered_under_its_name() -> None:
    assert get_model("qwen2kit") is Qwen2KitLM


def test_loglikelihood_is_the_reference_models(lm: Qwen2KitLM, tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    context, continuation = "the cat sat", " on the mat"
    ids = lm.tokenizer.encode(context + continuation)
    start = len(lm.tokenizer.encode(context))
    logits = ReferenceModel(checkpoint.spec, checkpoint.weights).logits(ids)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = sum(logp[i - 1, ids[i]] for i in range(start, len(ids)))
    [(value, greedy)] = lm.loglikelihood([instance("loglikelihood", context, continuation)])
    assert value == pytest.approx(expected, abs=1e-9)
    assert not greedy


def test_trailing_spaces_of_the_context_are_scored(lm: Qwen2KitLM) -> None:
    spy = Spy(lm)
    lm.loglikelihood([instance("loglikelihood", "the cat  ", "sat")], disable_tqdm=True)
    [request] = spy.requests
    assert lm.tokenizer.decode(request.context) == "the cat"
    assert lm.tokenizer.decode(request.continuation) == "  sat"


def test_empty_context_is_the_prefix_token(lm: Qwen2KitLM, tiny: Path) -> None:
    spy = Spy(lm)
    lm.loglikelihood([instance("loglikelihood", "", "cat")], disable_tqdm=True)
    assert spy.requests[0].context == (lm.tokenizer.eot_id,)
    other = Qwen2KitLM(load_reference(tiny), prefix_token_id=7)
    spy = Spy(other)
    other.loglikelihood([instance("loglikelihood", "", "cat")], disable_tqdm=True)
    assert spy.requests[0].context == (7,)


def test_long_contexts_lose_their_beginning(tiny: Path) -> None:
    lm = Qwen2KitLM(load_reference(tiny), max_length=8)
    spy = Spy(lm)
    text = "the cat sat on the mat and the dog ran"
    lm.loglikelihood([instance("loglikelihood", text, " what")], disable_tqdm=True)
    [request] = spy.requests
    whole = lm.tokenizer.encode(text + " what")
    assert [*request.context, *request.continuation] == whole[-9:]
    assert lm.truncated == 1


def test_impossible_continuations_are_one_line_errors(tiny: Path) -> None:
    lm = Qwen2KitLM(load_reference(tiny), max_length=4)
    with pytest.raises(DataError, match="exceeds the context limit of 4"):
        lm.loglikelihood([instance("loglikelihood", "a", " xyzzy quux plugh")])
    with pytest.raises(DataError, match="adds no token"):
        lm.loglikelihood([instance("loglikelihood", "cat", "")])


def test_rolling_predicts_every_token_once(tiny: Path) -> None:
    lm = Qwen2KitLM(load_reference(tiny), max_length=6)
    spy = Spy(lm)
    text = "the cat sat on the mat and the dog ran one two three four"
    [total] = lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    ids = lm.tokenizer.encode(text)
    assert [t for r in spy.requests for t in r.continuation] == ids
    assert spy.requests[0].context == (lm.tokenizer.eot_id,)
    assert all(len(r.context) + len(r.continuation) <= 7 for r in spy.requests)
    assert total < 0
    assert lm.loglikelihood_rolling([instance("loglikelihood_rolling", "")]) == [0.0]


def test_answers_reach_the_cache_hook(lm: Qwen2KitLM) -> None:
    hook = Hook()
    lm.set_cache_hook(hook)
    answers = lm.loglikelihood([instance("loglikelihood", "the", " cat")], disable_tqdm=True)
    lm.loglikelihood_rolling([instance("loglikelihood_rolling", "cat")], disable_tqdm=True)
    lm.generate_until([instance("generate_until", "the", {"max_gen_toks": 1})], disable_tqdm=True)
    assert hook.seen[0] == ("loglikelihood", ("the", " cat"), answers[0])
    assert [kind for kind, _, _ in hook.seen] == [
        "loglikelihood",
        "loglikelihood_rolling",
        "generate_until",
    ]


def test_generation_runs_through_one_engine_and_keeps_request_order(tiny: Path) -> None:
    lm = Qwen2KitLM(load_reference(tiny), batch_size=2)
    prompts = ["the", "the cat sat on the mat", "the cat", "one two three"]
    kwargs = [{"max_gen_toks": 3}, {"max_gen_toks": 3}, {"max_gen_toks": 3}, {"max_gen_toks": 2}]
    requests = [instance("generate_until", p, k) for p, k in zip(prompts, kwargs, strict=True)]
    together = lm.generate_until(requests, disable_tqdm=True)
    assert lm.loaded.model.batches == [2]  # type: ignore[attr-defined]
    alone = [lm.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert together == alone


def test_an_answer_is_logged_when_it_ends_and_frees_its_place(tiny: Path) -> None:
    """Two places, three prompts: the shortest answer ends first, and the waiting prompt starts."""
    lm = Qwen2KitLM(load_reference(tiny), batch_size=2)
    model: Any = lm.loaded.model
    logged: list[tuple[int, int]] = []
    asked = [("a", 30), ("b", 2), ("c", 2)]
    requests = [instance("generate_until", text, {"max_gen_toks": n}) for text, n in asked]
    lm.log.add = lambda key, answer: logged.append((model.steps, key))  # type: ignore
    lm.generate_until(requests, disable_tqdm=True)
    keys = lm.log.text_keys((r.args for r in requests), [lm.seed, lm.max_gen_toks])
    assert [keys.index(key) for _, key in logged] == [1, 2, 0]
    assert logged[0][0] < logged[1][0] < logged[2][0]
    assert logged[1][0] <= 2 * 2 + 2 * 2 + 1  # the two short ones, beside the long one


def test_generation_ends_at_the_first_stop_string(lm: Qwen2KitLM) -> None:
    model: Any = lm.loaded.model
    free = {"max_gen_toks": 20}
    [text] = lm.generate_until([instance("generate_until", "the cat", free)], disable_tqdm=True)
    stop = text[len(text) // 2 :][:2]
    steps, model.steps = model.steps, 0
    stopped = {"max_gen_toks": 20, "until": [stop, ""]}
    [cut] = lm.generate_until([instance("generate_until", "the cat", stopped)], disable_tqdm=True)
    assert cut == text[: text.index(stop)]
    assert model.steps < steps
    assert model.closed == 2


def test_special_tokens_as_stop_strings_become_stop_ids(tiny: Path) -> None:
    from qwen2kit_evals.generation import decoding

    loaded = load_reference(tiny)
    how = decoding(loaded, {"until": ["<|im_start|>", "x"]}, default_max_tokens=9, seed=0)
    assert loaded.tokenizer.im_start_id in how.sampling.stop_token_ids
    assert set(loaded.checkpoint.generation.stop_token_ids) <= set(how.sampling.stop_token_ids)
    assert how.stop == ("x",)
    assert how.sampling.max_new_tokens == 9
    assert how.sampling.temperature == 0


def test_sampling_follows_the_task_and_its_repeats_differ(tiny: Path) -> None:
    lm = Qwen2KitLM(load_reference(tiny), batch_size=2)
    kwargs = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_gen_toks": 8}
    requests = [instance("generate_until", "the cat", kwargs)] * 4
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) == 4
    assert lm.generate_until(requests, disable_tqdm=True) == texts


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "beam search"),
        ({"do_sample": True}, "temperature above 0"),
        ({"penalty_alpha": 0.6}, "penalty_alpha not supported"),
        ({"max_gen_toks": 256}, "leave no room"),
    ],
)
def test_unsupported_generation_settings_are_refused(
    lm: Qwen2KitLM, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        lm.generate_until([instance("generate_until", "the", kwargs)], disable_tqdm=True)


def test_chat_prompts_equal_transformers(lm: Qwen2KitLM, tiny: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(tiny)
    history = [
        {"role": "user", "content": "one two?"},
        {"role": "assistant", "content": "three "},
        {"role": "user", "content": "four"},
    ]
    asked = peer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    assert lm.apply_chat_template(history) == asked
    begun = [*history, {"role": "assistant", "content": "The answer is "}]
    goes_on = peer.apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == goes_on
    assert lm.chat_template(True) == peer.chat_template
    with pytest.raises(ConfigError, match="no chat template named"):
        lm.chat_template("rag")


def test_model_args_win_over_lm_evals_defaults(tiny: Path) -> None:
    loaded = load_reference(tiny)
    lm = Qwen2KitLM.create_from_arg_obj(
        {"pretrained": loaded, "batch_size": 3}, {"batch_size": 1, "device": "cuda:0"}
    )
    assert lm.batch_size == 3
    assert Qwen2KitLM(loaded, batch_size="auto").batch_size == 16  # on a CPU
    assert Qwen2KitLM(loaded, batch_size="auto", max_batch_size=4).batch_size == 4


@pytest.mark.parametrize("arguments", [{"batch_size": "many"}, {"batch_size": 0}, {"tpu": True}])
def test_bad_model_args(tiny: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(Qwen2KitError):
        Qwen2KitLM(load_reference(tiny), **arguments)
