"""Streaming: whatever the pieces, the joined text is the whole text; stops cut exactly."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.errors import ConfigError
from qwen2kit.generate.stream import TextStream
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.train_bbpe import train_bbpe

UNICODE = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("👩‍👩‍👧🇩🇪你好é\n "), max_size=60
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bbpe(["the end of the stop, the stop word. 你好 🎉 " * 9], 280)


def run(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token) for token in ids]
    return "".join([*pieces, stream.finish()]), stream.stopped


def first_completed(text: str, stop: tuple[str, ...]) -> int | None:
    """Where to cut, found the slow way: grow the text until it ends in a stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return min(starts)
    return None


@given(text=UNICODE)
@settings(max_examples=200, deadline=None)
def test_joined_text_is_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert run(tokenizer, ids) == (tokenizer.decode(ids, skip_special=True), False)


@given(ids=st.lists(st.integers(0, 279), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_ids_even_broken_utf8(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert run(tokenizer, ids)[0] == tokenizer.decode(ids, skip_special=True)


@given(
    ids=st.lists(st.integers(0, 279), max_size=30),
    stop=st.sampled_from([(), ("stop",), ("\ufffd\ufffd\ufffd\ufffd",)]),
)
@settings(max_examples=200, deadline=None)
def test_what_is_held_back_stays_short(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]
) -> None:
    broken = [token for token in range(256) if tokenizer.token_bytes(token)[0] >= 0x80]
    stream, said, longest = TextStream(tokenizer, stop), "", max(map(len, stop), default=0)
    fed: list[int] = []
    for token in [*ids, *broken, *ids]:
        said += stream.push(token)
        fed.append(token)
        if stream.stopped:
            return
        whole = tokenizer.decode(fed, skip_special=True)
        assert len(whole) - len(said) <= 3 + longest


@given(
    text=st.text("abc", max_size=20),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3).map(tuple),
    cuts=st.sets(st.integers(0, 20)),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_cut_whatever_the_chunks(
    text: str, stop: tuple[str, ...], cuts: set[int]
) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    chunks = [text[a:b] for a, b in itertools.pairwise(edges)]

    class Speller:
        special_ids: frozenset[int] = frozenset()

        def token_bytes(self, token_id: int) -> bytes:
            return chunks[token_id].encode()

    stream = TextStream(Speller(), stop)
    shown = ""
    for index in range(len(chunks)):
        shown += stream.push(index)
    shown += stream.finish()
    cut = first_completed(text, stop)
    assert (shown, stream.stopped) == (text if cut is None else text[:cut], cut is not None)


def test_incomplete_characters_are_held_back(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    byte_ids = [tokenizer.encode("é", allow_special=False), tokenizer.encode("ñ")]
    assert [len(ids) for ids in byte_ids] == [2, 2]
    assert [stream.push(token) for ids in byte_ids for token in ids] == ["", "é", "", "ñ"]


def test_text_appears_as_soon_as_it_is_final(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("stop",))
    shown = [stream.push(token) for token in tokenizer.encode("s")]
    assert shown == [""]
    (x,) = tokenizer.encode("x")
    assert stream.push(x) == "sx"
    assert stream.finish() == ""


def test_after_a_stop_nothing_follows(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("stop",))
    text = "".join(stream.push(token) for token in tokenizer.encode("the stop word"))
    assert (text, stream.stopped, stream.finish()) == ("the ", True, "")


def test_special_tokens_are_skipped(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("the"), tokenizer.im_end_id, *tokenizer.encode(" end")]
    assert run(tokenizer, ids) == ("the end", False)


def test_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="must not be empty"):
        TextStream(tokenizer, ("a", ""))
