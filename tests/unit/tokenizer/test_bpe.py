"""Encoding, decoding and saving, against transformers' Qwen2Tokenizer on the same vocabulary."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.errors import TokenizerError
from qwen2kit.tokenizer.bpe import Tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80) | st.text(
    st.sampled_from("aZ é1 \n\r\t'sLL.<|>_好🎉\u0301\u200d"), max_size=80
)


@pytest.fixture(scope="module")
def saved(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    small.save(path, model_max_length=2048)
    return path


@pytest.fixture(scope="module")
def hf(saved: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(saved)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_round_trip_is_nfc(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text, allow_special=False)) == unicodedata.normalize(
        "NFC", text
    )


@given(text=TEXT)
@settings(max_examples=300, deadline=None)
def test_ids_equal_transformers(small: Tokenizer, hf: Any, text: str) -> None:
    ids = small.encode(text)
    assert ids == hf.encode(text)
    assert small.decode(ids) == hf.decode(ids)


@given(ids=st.lists(st.integers(0, 479), max_size=40))
@settings(max_examples=200, deadline=None)
def test_decoding_any_ids_equals_transformers(small: Tokenizer, hf: Any, ids: list[int]) -> None:
    assert small.decode(ids) == hf.decode(ids)
    assert small.decode(ids, skip_special=True) == hf.decode(ids, skip_special_tokens=True)


def test_saved_settings_reach_transformers(small: Tokenizer, hf: Any) -> None:
    assert type(hf).__name__ == "Qwen2Tokenizer"
    assert (hf.eos_token_id, hf.pad_token_id) == (small.im_end_id, small.eot_id)
    assert (hf.bos_token, hf.unk_token, hf.model_max_length) == (None, None, 2048)
    assert len(hf) == small.vocab_size == 480
    assert set(hf.all_special_ids) <= small.special_ids


def test_mlx_lm_loads_the_saved_files(small: Tokenizer, saved: Path) -> None:
    utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    theirs = utils.load(saved)
    text = "It's 12 tokens, café 🎉<|im_end|>"
    assert theirs.encode(text) == small.encode(text)
    streamer = theirs.detokenizer
    for token in small.encode("It's 12 tokens, café 🎉"):
        streamer.add_token(token)
    streamer.finalize()
    assert streamer.text == "It's 12 tokens, café 🎉"


def test_control_tokens_can_be_plain_text(small: Tokenizer) -> None:
    text = "a<|im_start|>b<|endoftext|>"
    assert small.im_start_id in small.encode(text)
    literal = small.encode(text, allow_special=False)
    assert not small.special_ids & set(literal)
    assert small.decode(literal) == text
    assert small.decode(small.encode(text), skip_special=True) == "ab"


def test_reading_back_what_was_saved(small: Tokenizer, saved: Path, tmp_path: Path) -> None:
    again = Tokenizer.from_dir(saved)
    assert again.model_max_length == 2048
    assert again.chat_template == small.chat_template
    again.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_saving_over_a_separate_template_removes_it(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("old")
    small.save(tmp_path)
    assert Tokenizer.from_dir(tmp_path).chat_template == small.chat_template


def test_token_bytes_join_to_the_text(small: Tokenizer) -> None:
    text = "naïve 好 🎉\n"
    assert b"".join(map(small.token_bytes, small.encode(text))) == text.encode()
    assert small.token_bytes(small.im_end_id) == b"<|im_end|>"


@pytest.mark.parametrize("bad", [-1, 480, 151_936])
def test_ids_outside_the_vocabulary_are_refused(small: Tokenizer, bad: int) -> None:
    with pytest.raises(TokenizerError, match=f"{bad} is outside"):
        small.decode([0, bad])


def test_lone_surrogates_are_refused(small: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogates"):
        small.encode("a\ud800")


def test_ids_and_stop_list(small: Tokenizer) -> None:
    assert (small.eot_id, small.im_start_id, small.im_end_id) == (477, 478, 479)
    assert small.pad_id == small.eot_id
    assert small.stop_ids == (479, 477)
    assert small.token_to_id("<tool_call>") is None


def test_config_is_plain_json_with_the_template_inside(small: Tokenizer, saved: Path) -> None:
    config = json.loads((saved / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == small.chat_template
    assert config["tokenizer_class"] == "Qwen2Tokenizer"
    assert config["added_tokens_decoder"]["479"]["content"] == "<|im_end|>"
