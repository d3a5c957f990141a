"""The genuine Qwen2.5 vocabulary: published ids, transformers, every file format."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.tokenizer.bpe import Tokenizer

pytestmark = pytest.mark.real_model

GOLDENS = json.loads((Path(__file__).parent / "qwen25_goldens.json").read_text(encoding="utf-8"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=120)
PUBLISHED = {
    "Hello world": [9707, 1879],
    "It's 12345 tokens": [2132, 594, 220, 16, 17, 18, 19, 20, 11211],
    "你好，世界": [108386, 3837, 99489],
    "e\u0301": [963],
    " e\u0301": [3958],
    "DON'T": [84641, 17323],
}


@pytest.fixture(scope="module")
def saved(real: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real")
    real.save(path)
    return path


@pytest.fixture(scope="module")
def hf(saved: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="module")
def hf_from_gguf(real_gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name)


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_ids(real: Tokenizer, text: str) -> None:
    assert real.encode(text) == PUBLISHED[text]


@pytest.mark.parametrize("golden", GOLDENS["ids"], ids=lambda golden: repr(golden["text"]))
def test_recorded_ids(real: Tokenizer, golden: dict[str, Any]) -> None:
    assert real.encode(golden["text"]) == golden["ids"]
    assert real.decode(golden["ids"]) == unicodedata.normalize("NFC", golden["text"])


@pytest.mark.parametrize("chat", GOLDENS["chats"])
def test_recorded_chats(real: Tokenizer, hf: Any, chat: dict[str, Any]) -> None:
    options = {"tools": chat["tools"], "add_generation_prompt": chat["add_generation_prompt"]}
    assert real.render_chat(chat["messages"], **options) == chat["text"]
    assert hf.apply_chat_template(chat["messages"], tokenize=False, **options) == chat["text"]
    assert real.encode_chat(chat["messages"], **options) == hf.encode(chat["text"])


def test_counts_and_control_ids(real: Tokenizer) -> None:
    assert real.vocab_size == 151_665
    assert (real.eot_id, real.im_start_id, real.im_end_id) == (151_643, 151_644, 151_645)
    assert real.stop_ids == (151_645, 151_643)
    assert real.token_to_id("<tool_call>") == 151_657
    assert 151_657 not in real.special_ids
    assert real.token_to_id("[PAD151665]") is None


@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_equals_transformers(real: Tokenizer, hf: Any, text: str) -> None:
    ids = real.encode(text)
    assert ids == hf.encode(text)
    assert real.decode(ids) == hf.decode(ids) == unicodedata.normalize("NFC", text)


@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_equals_transformers_reading_the_gguf(
    real: Tokenizer, hf_from_gguf: Any, text: str
) -> None:
    # its conversion leaves out NFC, so it is given text that is already normal
    normal = unicodedata.normalize("NFC", text)
    assert real.encode(normal) == hf_from_gguf.encode(normal)


def test_tiktoken_file_gives_back_vocabulary_and_merges(
    real: Tokenizer, hf_from_gguf: Any, tmp_path: Path
) -> None:
    lines = [f"{base64.b64encode(real.token_bytes(i)).decode()} {i}" for i in range(151_643)]
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines))
    rebuilt = Tokenizer.from_dir(tmp_path)
    rebuilt.save(tmp_path / "out")
    model = json.loads((tmp_path / "out/tokenizer.json").read_text(encoding="utf-8"))["model"]
    theirs = json.loads(hf_from_gguf.backend_tokenizer.to_str())["model"]
    assert model["merges"] == theirs["merges"]
    assert rebuilt.vocab_size == 151_646
    assert rebuilt.default_system == "You are a helpful assistant."
