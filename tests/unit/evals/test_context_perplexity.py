"""Perplexity by context length against transformers' own loss, window by window."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log
from pathlib import Path

import numpy as np
import pytest

from qwen2kit.errors import ConfigError, DataError
from qwen2kit_evals.averages import mean_and_stderr
from qwen2kit_evals.context_perplexity import block_starts, context_perplexity
from qwen2kit_evals.request_log import RequestLog
from tests.unit.evals.reference_lm import load_reference

TEXT = "the cat sat on the mat and the dog ran; émü one two three four what is the answer? " * 3


def test_scores_equal_transformers_losses(tiny: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loaded = load_reference(tiny)
    with RequestLog() as answers:
        points = context_perplexity(
            loaded, TEXT, [24, 8, 16], stride=4, blocks=3, answers=answers
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    hf = transformers.AutoTokenizer.from_pretrained(tiny)  # a letter per byte in its tokens
    tokens = loaded.tokenizer.encode(TEXT)
    starts = block_starts(len(tokens), 24, 4, 3)
    assert [point.length for point in points] == [8, 16, 24]
    for point in points:
        losses = []
        for start in starts:
            window = torch.tensor([tokens[start + 4 - point.length : start + 4]])
            labels = window.clone()
            labels[:, :-4] = -100
            with torch.no_grad():
                losses.append(float(model(window, labels=labels).loss))
        assert point.nll == pytest.approx(np.mean(losses), abs=1e-4)
        assert point.stderr == pytest.approx(np.std(losses, ddof=1) / 3**0.5, abs=1e-4)
        assert point.perplexity == pytest.approx(exp(point.nll))
        assert point.tokens == 12
        size = sum(len(hf.convert_ids_to_tokens(tokens[s + n])) for s in starts for n in range(4))
        assert point.bits_per_byte == pytest.approx(sum(losses) * 4 / log(2) / size, abs=1e-4)


def test_known_scores_are_not_computed_again(tiny: Path, tmp_path: Path) -> None:
    loaded = load_reference(tiny)

    def run(lengths: list[int]) -> tuple[list[float], int]:
        with RequestLog(tmp_path / "requests.jsonl") as answers:
            points = context_perplexity(
                loaded, TEXT, lengths, stride=4, blocks=2, answers=answers
            )  # fmt: skip
            return [point.nll for point in points], answers.computed

    first, computed = run([8, 16])
    assert computed == 4
    assert run([8, 16]) == (first, 0)


def test_blocks_are_spread_and_never_overlap() -> None:
    assert block_starts(100, 20, 10, 99) == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert block_starts(100, 20, 10, 3) == [10, 40, 70]
    assert block_starts(20, 20, 10, 3) == [10]
    for tokens in range(64, 300, 17):
        starts = block_starts(tokens, 64, 7, 5)
        assert all(later - earlier >= 7 for earlier, later in pairwise(starts))
        assert starts[0] >= 57
        assert starts[-1] + 7 <= tokens
    with pytest.raises(DataError, match="19 tokens, fewer than the longest length, 20"):
        block_starts(19, 20, 10, 3)


@pytest.mark.parametrize(
    ("lengths", "stride", "blocks", "message"),
    [
        ([8], 8, 1, "must exceed the stride"), ([8], 0, 1, "at least 1"), ([8], 4, 0, "at least 1"),
        ([8, 9999], 4, 1, "exceeds the model's context"), ([1], None, 1, "at least 1"),
    ],
)  # fmt: skip
def test_impossible_lengths_are_refused(
    tiny: Path, lengths: list[int], stride: int | None, blocks: int, message: str
) -> None:
    with RequestLog() as answers, pytest.raises(ConfigError, match=message):
        context_perplexity(
            load_reference(tiny), TEXT, lengths, stride=stride, blocks=blocks, answers=answers
        )  # fmt: skip


def test_means_and_their_errors_are_numpys() -> None:
    values = [0.5, 2.0, 4.0, 4.0]
    mean, stderr = mean_and_stderr(values)
    assert mean == np.mean(values)
    assert stderr == pytest.approx(np.std(values, ddof=1) / 2)
    assert mean_and_stderr([3.0]) == (3.0, None)
