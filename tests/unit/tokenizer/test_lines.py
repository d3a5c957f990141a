"""Encoding piece by piece equals encoding whole texts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.lines import LineEncoder

# What Qwen2's splitting distinguishes, and what Unicode normalisation might join.
PIECES = ["\n", "\r", "\n\n", " ", "\t", "A", "z", "é", "e\u0301", "\u0301", "猫", "7", ".", "'s",
          "?", "\u00a0", "\u2028", "<|im_start|>", "<|endoftext|>", "Answer:", " the"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@settings(max_examples=600, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4))
def test_pieces_add_up(small: Tokenizer, several: list[str]) -> None:
    assert small.begins_anew_at_lines
    lines = LineEncoder(small)
    assert lines.encode(several) == small.encode_many(several)
    assert lines.encode([*several, "x"]) == small.encode_many([*several, "x"])


@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_pairs_are_whole_texts_cut_after_the_context(
    small: Tokenizer, pairs: list[tuple[str, str]]
) -> None:
    found = LineEncoder(small).encode_pairs(pairs)
    for (context, continuation), (ids, rest) in zip(pairs, found, strict=True):
        assert list(ids) == small.encode(context)
        assert list(rest) == small.encode(context + continuation)[len(ids) :]


def test_choices_share_the_ids_of_their_context(small: Tokenizer) -> None:
    pairs = [("Q one\nA", " two"), ("Q one\nA", " three"), ("Q\n", "A")]
    first, second, _ = LineEncoder(small).encode_pairs(pairs)
    assert first[0] is second[0]


@settings(max_examples=400, deadline=None)
@given(texts)
def test_pieces_of_the_real_tokenizer_add_up(real: Tokenizer, text: str) -> None:
    assert LineEncoder(real).encode([text]) == [real.encode(text)]


def test_a_line_is_encoded_once(small: Tokenizer) -> None:
    lines, seen = LineEncoder(small), []
    encode_many = small.encode_many
    try:
        small.encode_many = lambda texts: seen.extend(texts) or encode_many(texts)  # type: ignore
        lines.encode(["Q one\nA two\nQ three", "Q one\nA two\nQ four", "A two\n"])
    finally:
        del small.encode_many  # type: ignore[method-assign]
    assert seen == ["Q one\n", "A two\n", "Q three", "Q four"]


def test_another_splitting_is_encoded_whole(small: Tokenizer, monkeypatch) -> None:  # type: ignore
    """A splitting that keeps a line break with the word after it."""
    import tokenizers

    document = small._encoder.to_str().replace(r"\\s*[\\r\\n]+|", r"\\s*[\\r\\n]+[A-Z]|")
    other = object.__new__(Tokenizer)
    other.__dict__ |= small.__dict__
    other.__dict__.pop("begins_anew_at_lines", None)
    other._encoder = tokenizers.Tokenizer.from_str(document)
    assert not other.begins_anew_at_lines
    assert LineEncoder(other).encode(["one\nTwo"]) == [other.encode("one\nTwo")]
