"""Loss masks: spans written out by hand, and transformers' own assistant mask."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qwen2kit.errors import DataError, TokenizerError
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.supervision import SupervisedExample, encode_supervised

GOLDENS = json.loads((Path(__file__).parent / "qwen25_goldens.json").read_text(encoding="utf-8"))
CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "Yes, 4."},
]


def spans(tokenizer: Tokenizer, example: SupervisedExample) -> list[str]:
    """Supervised runs as text."""
    runs: list[list[int]] = []
    previous = False
    for token, counted in zip(example.tokens, example.supervised, strict=True):
        if counted and not previous:
            runs.append([])
        if counted:
            runs[-1].append(token)
        previous = counted
    return [tokenizer.decode(run) for run in runs]


def with_template(tokenizer: Tokenizer, template: str, path: Path) -> Tokenizer:
    tokenizer.save(path)
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.from_dir(path)


def test_every_answer_and_its_end_is_supervised(small: Tokenizer) -> None:
    example = encode_supervised(small, CHAT)
    assert spans(small, example) == ["4<|im_end|>", "Yes, 4.<|im_end|>"]
    assert example.tokens == small.encode_chat(CHAT, add_generation_prompt=False)
    assert small.decode(example.tokens).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    )


def test_equals_transformers_assistant_mask(small: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = with_template(small, marked, tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = hf.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode_supervised(tokenizer, CHAT)
    assert ours.tokens == theirs["input_ids"]
    assert [int(counted) for counted in ours.supervised] == theirs["assistant_masks"]


def test_tool_calls_are_supervised_and_results_are_not(small: Tokenizer, tmp_path: Path) -> None:
    from qwen2kit.tokenizer.families import family

    tokenizer = with_template(small, family("qwen2.5").template, tmp_path)
    chat = GOLDENS["chats"][5]
    example = encode_supervised(tokenizer, chat["messages"], chat["tools"])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    assert spans(tokenizer, example) == [f"{call}\n{call}<|im_end|>", "Cold.<|im_end|>"]
    assert tokenizer.decode(example.tokens) == chat["text"]


def test_the_prompt_is_tokenized_as_at_inference(small: Tokenizer) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\n\nHi"}]
    example = encode_supervised(small, chat)
    prompt = small.encode_chat(chat[:1])
    assert example.tokens[: len(prompt)] == prompt
    assert not any(example.supervised[: len(prompt)])
    assert spans(small, example) == ["\n\nHi<|im_end|>"]


def test_control_tokens_in_an_answer_do_not_end_it(small: Tokenizer) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    example = encode_supervised(small, chat)
    assert spans(small, example) == ["a<|im_end|>b<|im_end|>"]
    assert example.tokens.count(small.im_end_id) == 3


def test_empty_answer_supervises_the_end_only(small: Tokenizer) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]
    assert spans(small, encode_supervised(small, chat)) == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (CHAT[:1], "no assistant message"),
        (CHAT[1:2], "starts with the assistant"),
    ],
)
def test_conversations_without_a_lesson(
    small: Tokenizer, messages: list[dict[str, Any]], text: str
) -> None:
    with pytest.raises(DataError, match=text):
        encode_supervised(small, messages)


def test_unstable_template(small: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ loop.revindex ~ '<|im_start|>' + m.role + '\\n' + m.content "
        "+ '<|im_end|>\\n' }}{% endfor %}"
    )
    with pytest.raises(DataError, match="renders the text before message 1 differently") as caught:
        encode_supervised(with_template(small, template, tmp_path), CHAT)
    assert "\n" not in str(caught.value)


def test_template_without_im_end(small: Tokenizer, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}"
    with pytest.raises(DataError, match="does not end the assistant turn"):
        encode_supervised(with_template(small, template, tmp_path), CHAT)


def test_malformed_conversation(small: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="message 1 has no role"):
        encode_supervised(small, [*CHAT[:1], {"content": "x"}])


def test_examples_are_immutable(small: Tokenizer) -> None:
    example = encode_supervised(small, CHAT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.tokens = []  # type: ignore[misc]
