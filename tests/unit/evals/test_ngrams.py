"""13-grams and the subsequence rule, against definitions written out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit_evals.ngrams import N, NgramIndex, is_contaminated, lcs_length, tokens

words = st.lists(st.sampled_from("abcdef"), max_size=40)


def lcs_by_table(first: list[str], second: list[str]) -> int:
    row = [0] * (len(second) + 1)
    for a in first:
        above = row[:]
        for j, b in enumerate(second, 1):
            row[j] = above[j - 1] + 1 if a == b else max(above[j], row[j - 1])
    return row[-1]


def grams(text: list[str]) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + N]) for i in range(len(text) - N + 1)}


@settings(max_examples=200, deadline=None)
@given(words, words)
def test_lcs_is_that_of_the_table(first: list[str], second: list[str]) -> None:
    assert lcs_length(first, second) == lcs_by_table(first, second)


def test_lcs_is_rapidfuzzs() -> None:
    distance = pytest.importorskip("rapidfuzz.distance")
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([rng.choice("abcdefgh") for _ in range(rng.randrange(400))] for _ in range(2))
        assert lcs_length(a, b) == distance.LCSseq.similarity(a, b)


def test_matches_are_shared_13_grams() -> None:
    rng = random.Random(1)
    tests = [[rng.choice("ab") for _ in range(rng.randrange(40))] for _ in range(60)]
    index = NgramIndex(tests)
    found = 0
    for _ in range(200):
        train = [rng.choice("abc" if rng.random() < 0.3 else "ab") for _ in range(60)]
        expected = {i for i, test in enumerate(tests) if grams(train) & grams(test)}
        matches = list(index.matches(train))
        assert {match.test for match in matches} == expected
        assert all(m.lcs == is_contaminated(train, tests[m.test]) for m in matches)
        found += len(expected)
    assert found > 20
    assert list(NgramIndex([["a"] * 12]).matches(["a"] * 50)) == []


def test_rule_at_its_edges() -> None:
    test = [f"w{i}" for i in range(20)]
    assert is_contaminated(test[:13], test)
    assert not is_contaminated(test[:12], test)
    noise = [f"n{i}" for i in range(40)]
    assert is_contaminated(test[:13] + noise[:8], test)  # 13 >= 0.6 x 20
    assert not is_contaminated(test[:13] + noise, test + noise[:0] + ["x", "y"])  # 13 < 0.6 x 22


def test_a_long_text_holds_a_subsequence_that_its_window_does_not() -> None:
    test = [f"w{i}" for i in range(40)]
    far = [word for w in test[13:] for word in (*["filler"] * 9, w)]
    (match,) = NgramIndex([test]).matches(test[:13] + ["filler"] * 60 + far)
    assert (match.lcs, match.window) == (True, False)
    (near,) = NgramIndex([test]).matches(["filler"] * 500 + test + ["filler"] * 500)
    assert (near.lcs, near.window) == (True, True)


def test_tokens_are_words_without_symbols() -> None:
    assert tokens("The ANSWER is: $1,000_x (Straße)!") == [
        "the",
        "answer",
        "is",
        "1",
        "000",
        "x",
        "strasse",
    ]
    assert tokens("答案：猫 and ねこ") == ["答", "案", "猫", "and", "ね", "こ"]
