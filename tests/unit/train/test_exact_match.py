"""Exact match counts only answers that are equal and that end by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qwen2kit.backend.protocol import TokenEvent
from qwen2kit.config.data_tree import EmbeddedData
from qwen2kit.data.embedded import Question, generate
from qwen2kit.data.encode import read_texts
from qwen2kit.generate.sampling import Sampling
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.train_bbpe import train_bbpe
from qwen2kit.train.exact_match import exact_match


class Parrot:
    """Answers the n-th prompt with the n-th text; texts ending in … are cut off."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.prompts: list[str] = []

    def generate(self, prompts: Sequence[Any], sampling: Sampling) -> Iterator[TokenEvent]:
        for index, prompt in enumerate(prompts):
            self.prompts.append(self.tokenizer.decode(prompt))
            text = self.texts.pop(0)
            ids = self.tokenizer.encode(text.removesuffix("…"))
            cut = text.endswith("…")
            for position, token in enumerate(ids):
                last = cut and position == len(ids) - 1
                yield TokenEvent(index, token, "length" if last else None)
            if not cut:
                yield TokenEvent(index, self.tokenizer.im_end_id, "stop")
        assert sampling.temperature == 0
        assert set(sampling.stop_token_ids) == {self.tokenizer.im_end_id, self.tokenizer.eot_id}


def test_scores() -> None:
    tokenizer = train_bbpe(read_texts(EmbeddedData(questions=300)), 320)
    questions: list[Question] = list(generate(0, 5, True))
    right = [question.answer for question in questions]
    texts = [right[0], f" {right[1]}\n", f"{right[2]}…", "no", f"{right[4]} "]
    parrot = Parrot(tokenizer, texts)
    result = exact_match(parrot, tokenizer, questions, batch=2)  # type: ignore[arg-type]
    assert (result.correct, result.total, result.score) == (3, 5, 0.6)
    assert result.answers == (right[0], right[1], "", "no", right[4])
    assert sum(correct for correct, _ in result.by_kind.values()) == 3
    assert sum(total for _, total in result.by_kind.values()) == 5
    assert parrot.prompts[0] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{questions[0].messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    )
