"""Perplexity, divergence and agreement of a conversion, against torch's own losses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen2kit.backend.registry import installed
from qwen2kit.errors import ConfigError, ParityError
from qwen2kit.parity import metrics
from qwen2kit.parity.metrics import negative_log_likelihood
from qwen2kit.parity.passages import FILE_TOKENS, held_out
from qwen2kit.parity.prompts import Prompt
from qwen2kit.parity.quality import measure_quality
from qwen2kit.weights.checkpoint import Checkpoint, open_checkpoint
from qwen2kit.weights.convert import convert
from tests.tiny_checkpoint import write_tiny_checkpoint

needs_backend = pytest.mark.skipif(not installed(), reason="no backend installed")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("quality") / "model"
    write_tiny_checkpoint(folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize("slice_elements", [10**9, 300])
def test_likelihood_is_torchs_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, slice_elements: int
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(metrics, "_SLICE_ELEMENTS", slice_elements)
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((23, 97)).astype(np.float32) * 4
    tokens = rng.integers(0, 97, 23).tolist()
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:-1]).double(), torch.tensor(tokens[1:]), reduction="sum"
    )
    assert negative_log_likelihood(logits, tokens) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ParityError, match="for 22 tokens"):
        negative_log_likelihood(logits, tokens[1:])


@needs_backend
def test_report_equals_transformers_on_both_models(original: Checkpoint, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    convert(original, tmp_path / "mlx", to="mlx", quantize_bits=3, group_size=32)
    quantised = open_checkpoint(tmp_path / "mlx")
    convert(quantised, tmp_path / "dense", to="hf", dtype="float32")
    windows = held_out(original.tokenizer(), context=original.spec.context_length)
    report = measure_quality(original, quantised, windows, text="auto")

    logits = []
    for path in (original.path, tmp_path / "dense"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append([model(torch.tensor([w.tokens])).logits[0].double() for w in windows])
    targets = torch.tensor([token for window in windows for token in window.tokens[1:]])
    for side, ours in zip(logits, (report.original, report.converted), strict=True):
        scores = torch.cat([part[:-1] for part in side])
        loss = torch.nn.functional.cross_entropy(scores, targets)
        assert ours.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    p, q = (torch.cat(side).log_softmax(-1) for side in logits)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert report.converted.kl == pytest.approx(float(kl), rel=1e-3)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert report.converted.top1_agreement == pytest.approx(float(same), abs=2 / len(targets))
    assert report.tokens == len(targets) + len(windows)
    assert (report.original.kl, report.original.top1_agreement) == (0.0, 1.0)
    assert report.original.bits_per_weight > 32 > report.converted.bits_per_weight
    size = (tmp_path / "mlx/model.safetensors").stat().st_size
    assert report.converted.bytes == size
    json.dumps(report.to_dict(), allow_nan=False)


@needs_backend
def test_fewer_bits_lose_more(original: Checkpoint, tmp_path: Path) -> None:
    windows = held_out(original.tokenizer(), context=64)[:3]
    losses = []
    for bits in (8, 4, 2):
        out = tmp_path / str(bits)
        convert(original, out, to="mlx", quantize_bits=bits, group_size=32)
        losses.append(measure_quality(original, open_checkpoint(out), windows, text="auto"))
    kl = [report.converted.kl for report in losses]
    assert 0 < kl[0] < kl[1] / 10 < kl[2] / 100


def test_windows_cover_the_text_once(original: Checkpoint, tmp_path: Path) -> None:
    tokenizer = original.tokenizer()
    text = "the cat sat on the mat and the dog ran. " * 3
    (tmp_path / "text.txt").write_text(text)
    windows = held_out(tokenizer, str(tmp_path / "text.txt"), context=16)
    assert max(len(window.tokens) for window in windows) <= 16
    assert [t for window in windows for t in window.tokens] == tokenizer.encode(text)
    assert all(isinstance(window, Prompt) for window in windows)
    (tmp_path / "long.txt").write_text(text * 4000)
    windows = held_out(tokenizer, str(tmp_path / "long.txt"), context=256)
    assert sum(len(window.tokens) for window in windows) == FILE_TOKENS


def test_a_text_that_cannot_be_used_is_one_line(original: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    for name, message in (
        ("absent.txt", "cannot be read"),
        ("empty.txt", "no two tokens"),
        ("latin.txt", "not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=message):
            held_out(original.tokenizer(), str(tmp_path / name), context=64)
