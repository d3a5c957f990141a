"""Parity metrics against plain NumPy on whole arrays, and prompts against their promises."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen2kit.common_prefix import common_prefix
from qwen2kit.errors import ConfigError, ParityError
from qwen2kit.parity import metrics
from qwen2kit.parity.metrics import compare_logits, merge_deltas
from qwen2kit.parity.prompts import prompt_set


def _pair(rows: int = 37, vocab: int = 211, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    a = rng.standard_normal((rows, vocab)).astype(np.float32) * 3
    return a, a + rng.standard_normal(a.shape).astype(np.float32) * np.float32(noise)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("slice_elements", [10**9, 500])
def test_equals_numpy(monkeypatch: pytest.MonkeyPatch, slice_elements: int) -> None:
    monkeypatch.setattr(metrics, "_SLICE_ELEMENTS", slice_elements)
    a, b = _pair()
    delta = compare_logits(a, b)
    diff = np.abs(a - b)
    p, q = _softmax(a), _softmax(b)
    assert delta.max_abs == diff.max()
    assert delta.median_abs == np.sort(diff.reshape(-1))[(diff.size - 1) // 2]
    assert delta.kl == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-9)
    assert delta.top1_agreement == float((a.argmax(-1) == b.argmax(-1)).mean())
    assert 0 < delta.top1_agreement < 1
    assert delta.positions == len(a)


def test_identical_arrays_have_no_difference() -> None:
    a, _ = _pair()
    delta = compare_logits(a, a.copy())
    assert (delta.max_abs, delta.median_abs, delta.kl, delta.top1_agreement) == (0, 0, 0, 1)
    assert delta.within(0.0)


def test_padding_tail_is_ignored() -> None:
    a, b = _pair()
    padded = np.concatenate([b, np.full((len(b), 13), 99, np.float32)], axis=1)
    assert compare_logits(a, padded) == compare_logits(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_never_passes(bad: float) -> None:
    a, b = _pair()
    b[5, 7] = bad
    delta = compare_logits(a, b)
    assert not delta.within(1e30)
    assert delta.to_dict()["max_abs"] is None
    json.dumps(delta.to_dict(), allow_nan=False)


@pytest.mark.parametrize("shapes", [((3, 5), (4, 5)), ((5,), (5,)), ((0, 5), (0, 5))])
def test_incomparable_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ParityError, match="cannot be compared"):
        compare_logits(*(np.zeros(shape, np.float32) for shape in shapes))


def test_merge_weights_by_positions() -> None:
    a, b = _pair()
    whole = compare_logits(a, b)
    merged = merge_deltas([compare_logits(a[:10], b[:10]), compare_logits(a[10:], b[10:])])
    assert merged.max_abs == whole.max_abs
    assert merged.kl == pytest.approx(whole.kl, rel=1e-9)
    assert merged.top1_agreement == pytest.approx(whole.top1_agreement)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2], [1, 2, 3], 2), ([1, 9], [1, 2], 1), ([], [1], 0)],
)
def test_common_prefix(a: list[int], b: list[int], expected: int) -> None:
    assert common_prefix(a, b) == expected


class _Bytes:
    """A tokenizer of one token per UTF-8 byte."""

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return list(f"<user>{messages[0]['content']}<assistant>".encode())


def test_prompts_are_fixed_and_of_the_length_asked_for() -> None:
    prompts = prompt_set(_Bytes("x"), max_tokens=2048)  # type: ignore[arg-type]
    assert prompts == prompt_set(_Bytes("x"), max_tokens=2048)  # type: ignore[arg-type]
    by_name = {prompt.name: prompt.tokens for prompt in prompts}
    assert len(by_name["long-2048"]) == 2048
    assert len(by_name["paragraphs"]) == 320
    assert bytes(by_name["chat"]).startswith(b"<user>")
    assert "港口" in bytes(by_name["chinese"]).decode()
    assert all(prompt.tokens for prompt in prompts)


def test_prompts_fit_the_context() -> None:
    prompts = prompt_set(_Bytes(None), context=64)  # type: ignore[arg-type]
    assert max(len(prompt.tokens) for prompt in prompts) == 64
    with pytest.raises(ConfigError, match="does not fit"):
        prompt_set(_Bytes(None), context=64, max_tokens=65)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        prompt_set(_Bytes(None), max_tokens=0)  # type: ignore[arg-type]
