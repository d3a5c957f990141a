"""Exact match counts only answers that are equal and that end by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qwen2kit.backend.conformance.models import UNTIED
from qwen2kit.config.data_tree import EmbeddedData
from qwen2kit.data.embedded import Question, generate
from qwen2kit.data.encode import read_texts
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.train_bbpe import train_bbpe
from qwen2kit.train.exact_match import exact_match
from tests.scripted_model import ScriptedModel


class Parrot(ScriptedModel):
    """Answers a prompt with the text meant for its question; texts ending in … go on and on."""

    def __init__(self, tokenizer: Tokenizer, texts: dict[str, str]) -> None:
        spec = replace(UNTIED, vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
        super().__init__(spec, self._answer)
        self.tokenizer, self.texts = tokenizer, texts
        self.prompts: list[str] = []

    def _answer(self, prompt: tuple[int, ...]) -> Sequence[int]:
        self.prompts.append(self.tokenizer.decode(list(prompt)))
        (text,) = (said for asked, said in self.texts.items() if asked in self.prompts[-1])
        ids = self.tokenizer.encode(text.removesuffix("…"))
        if text.endswith("…"):
            return ids * 24
        return [*ids, self.tokenizer.eot_id if "no" in text else self.tokenizer.im_end_id]


def test_scores() -> None:
    tokenizer = train_bbpe(read_texts(EmbeddedData(questions=300)), 320)
    questions: list[Question] = list(generate(0, 5, True))
    right = [question.answer for question in questions]
    texts = [right[0], f" {right[1]}\n", f"{right[2]}…", "no", f"{right[4]} "]
    asked = [question.messages[0]["content"] for question in questions]
    parrot = Parrot(tokenizer, dict(zip(asked, texts, strict=True)))
    result = exact_match(parrot, tokenizer, questions, batch=2)  # type: ignore[arg-type]
    assert (result.correct, result.total, result.score) == (3, 5, 0.6)
    assert result.answers == (right[0], right[1], "", "no", right[4])
    assert sum(correct for correct, _ in result.by_kind.values()) == 3
    assert sum(total for _, total in result.by_kind.values()) == 5
    assert set(parrot.prompts) == {
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{question.messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        for question in questions
    }
