"""All file formats give the same ids; damaged files are named in one line."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2kit.errors import TokenizerError
from qwen2kit.tokenizer.bpe import Tokenizer

Writer = Callable[[Path], None]


@pytest.fixture(scope="module")
def document(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("document")
    small.save(path)
    loaded: dict[str, Any] = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    return loaded


def write_vocab_and_merges(document: dict[str, Any], path: Path) -> None:
    model = document["model"]
    (path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_tiktoken(small: Tokenizer, document: dict[str, Any], path: Path) -> None:
    ids = sorted(document["model"]["vocab"].values())
    lines = [f"{base64.b64encode(small.token_bytes(i)).decode()} {i}\n" for i in ids]
    (path / "qwen.tiktoken").write_text("".join(lines))


def gguf_fields(small: Tokenizer, document: dict[str, Any]) -> dict[str, object]:
    model = document["model"]
    tokens = [*model["vocab"], "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD480]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": sorted(tokens[:-4], key=model["vocab"].get) + tokens[-4:],
        "tokenizer.ggml.token_type": [1] * len(model["vocab"]) + [3, 3, 3, 5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": small.im_end_id,
        "tokenizer.ggml.padding_token_id": small.eot_id,
    }


@pytest.fixture(scope="module")
def variants(
    small: Tokenizer, document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tokenizer]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("json", "vocab", "tiktoken")}
    small.save(folders["json"])
    write_vocab_and_merges(document, folders["vocab"])
    write_tiktoken(small, document, folders["tiktoken"])
    built = {name: Tokenizer.from_dir(path) for name, path in folders.items()}
    return built | {"gguf": Tokenizer.from_gguf(gguf_fields(small, document))}


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=200, deadline=None)
def test_formats_agree(small: Tokenizer, variants: dict[str, Tokenizer], text: str) -> None:
    wanted = small.encode(text)
    assert {name: t.encode(text) for name, t in variants.items()} == dict.fromkeys(variants, wanted)


def test_formats_agree_on_a_corpus_and_on_control_tokens(
    small: Tokenizer, variants: dict[str, Tokenizer]
) -> None:
    text = "<|im_start|>user\nThe quick brown fox isn't 12345 — 你好 🎉\r\n\r\n<|im_end|>"
    for tokenizer in variants.values():
        assert tokenizer.encode(text) == small.encode(text)
        assert tokenizer.vocab_size == small.vocab_size
        assert tokenizer.chat_template == small.chat_template
        assert tokenizer.special_ids == small.special_ids


def test_tiktoken_merges_are_recovered(
    variants: dict[str, Tokenizer], document: dict[str, Any], tmp_path: Path
) -> None:
    variants["tiktoken"].save(tmp_path)
    again = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert again["model"]["merges"] == document["model"]["merges"]
    assert again["model"]["vocab"] == document["model"]["vocab"]


def test_added_tokens_decoder_is_honoured(document: dict[str, Any], tmp_path: Path) -> None:
    write_vocab_and_merges(document, tmp_path)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
    decoder = {
        str(477 + i): {"content": name, "special": name[1] == "|"} for i, name in enumerate(names)
    }
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder, "eos_token": {"content": "<|im_end|>"}})
    )
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode("<tool_call>") == [480]
    assert tokenizer.encode("<tool_call>", allow_special=False) == [480]
    assert 480 not in tokenizer.special_ids
    assert tokenizer.eos_id == 479
    assert (tokenizer.default_system or "").startswith("You are Qwen")


def test_missing_normalizer_of_a_qwen2_class_is_nfc(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    document["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    assert Tokenizer.from_dir(tmp_path).encode("cafe\u0301") == small.encode("café")


@pytest.mark.parametrize(
    ("name", "text"),
    [("chat_template.jinja", "{{ 'J' }}"), ("chat_template.json", '{"chat_template": "J"}')],
)
def test_separate_template_files_win(
    small: Tokenizer, tmp_path: Path, name: str, text: str
) -> None:
    small.save(tmp_path)
    (tmp_path / name).write_text(text)
    message = [{"role": "user", "content": "x"}]
    assert Tokenizer.from_dir(tmp_path).render_chat(message) == "J"


def test_named_templates_use_the_default(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = [
        {"name": "rag", "template": "R"},
        {"name": "default", "template": "D"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_dir(tmp_path).chat_template == "D"


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer found; expected tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


DAMAGE = {
    "tokenizer.json": [
        (b'{"model": ', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "expected a JSON object"),
        (b'{"model": {"type": "Unigram"}}', "not BPE"),
        (b'{"model": {"type": "BPE", "vocab": {"a": "x"}}}', "integer ids"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 1, "b": 1}}}', "share an id"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}}, "decoder": null}', "byte-level"),
        (
            b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},'
            b' "decoder": {"type": "ByteLevel"}}',
            "not a usable tokenizer",
        ),
    ],
    "tokenizer_config.json": [
        (b"{", "not valid JSON"),
        (b'{"eos_token": 3}', "eos_token must be a token or null"),
        (b'{"eos_token": "<nope>"}', "'<nope>' is not in the vocabulary"),
        (b'{"chat_template": [{"name": "rag", "template": "R"}]}', "one named 'default'"),
    ],
    "chat_template.jinja": [(b"\xff", "not UTF-8")],
}


@pytest.mark.parametrize(
    ("name", "data", "message"), [(n, d, m) for n, cases in DAMAGE.items() for d, m in cases]
)
def test_damaged_files_are_named(
    small: Tokenizer, tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    small.save(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_dir(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["not base64!", *lines], "line 1 is not 'base64 rank'"),
        (lambda lines: [*lines[:3], *lines[4:]], "ranks are not 0"),
        (lambda lines: [lines[0], *lines], "line 2 holds an empty or repeated"),
        (lambda lines: lines[:200], "no token for byte"),
        (lambda lines: [*lines, b64_line(b"qqzzqq", len(lines))], "not a merge of two earlier"),
    ],
)
def test_damaged_tiktoken(
    small: Tokenizer,
    document: dict[str, Any],
    tmp_path: Path,
    change: Callable[[list[str]], list[str]],
    message: str,
) -> None:
    write_tiktoken(small, document, tmp_path)
    path = tmp_path / "qwen.tiktoken"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_dir(tmp_path)
    assert "qwen.tiktoken" in str(caught.value)


def b64_line(token: bytes, rank: int) -> str:
    return f"{base64.b64encode(token).decode()} {rank}"


def test_damaged_merges(document: dict[str, Any], tmp_path: Path) -> None:
    write_vocab_and_merges(document, tmp_path)
    with (tmp_path / "merges.txt").open("a", encoding="utf-8") as file:
        file.write("only-one-part\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt: line 223 is not two tokens"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None"),
        ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens is missing or empty"),
        ({"tokenizer.ggml.tokens": [1]}, "must hold strings"),
        ({"tokenizer.ggml.token_type": [1]}, "one entry for each"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' is not two tokens"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "not a usable tokenizer"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "9999 is outside"),
    ],
)
def test_damaged_gguf(
    small: Tokenizer, document: dict[str, Any], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_gguf(gguf_fields(small, document) | changes)
    assert "GGUF" in str(caught.value)


def test_gguf_token_of_unknown_type(small: Tokenizer, document: dict[str, Any]) -> None:
    fields = gguf_fields(small, document)
    types = [6, *fields["tokenizer.ggml.token_type"][1:]]  # type: ignore[index]
    with pytest.raises(TokenizerError, match="token 0 has type 6"):
        Tokenizer.from_gguf(fields | {"tokenizer.ggml.token_type": types})
