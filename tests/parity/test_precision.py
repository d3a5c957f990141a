"""Float32 log-probabilities are as near to float64 as transformers' are, and nearer where key
biases are as large as Qwen2's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from qwen2kit.backend.loading import load_model
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import CompiledModel, ScoreRequest
from qwen2kit.backend.slots import ANCHORED_KEYS, Feed, PersistentSlots
from qwen2kit.errors import WeightError
from qwen2kit.spec.model import RoPESpec
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.weights.checkpoint import open_checkpoint
from tests.tiny_checkpoint import VOCAB, write_tiny_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BACKENDS = ("torch", "mlx")
TEXTS = [np.random.default_rng(seed).integers(0, VOCAB, 200).tolist() for seed in range(4)]


@pytest.fixture(scope="module", params=["small", "large"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp(request.param) / "model"
    rope = RoPESpec(rope_theta=1e6)
    write_tiny_checkpoint(found, scale=0.15, rope=rope, max_position_embeddings=512)
    if request.param == "large":
        enlarge(found)
    return found


def enlarge(path: Path) -> None:
    """Key biases of up to 200 where rotations are slow, as Qwen2's first layers have them."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("k_proj.bias"):
            heads = tensor.reshape(-1, 2, 8)
            heads[:, :, 6:] += np.random.default_rng(1).uniform(-200, 200, heads[:, :, 6:].shape)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def exact(path: Path) -> list[NDArray[np.float64]]:
    checkpoint = open_checkpoint(path)
    reference = ReferenceModel(checkpoint.spec, checkpoint.weights)
    return [logprobs(reference.logits(text), text) for text in TEXTS]


@pytest.fixture(scope="module")
def theirs(path: Path, exact: list[NDArray[np.float64]]) -> float:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = [model(torch.tensor([text])).logits[0].numpy() for text in TEXTS]
    return error([logprobs(x, text) for x, text in zip(found, TEXTS, strict=True)], exact)


def logprobs(logits: NDArray[Any], text: list[int]) -> NDArray[np.float64]:
    """Of every token of ``text`` but the first."""
    wide = logits[:-1].astype(np.float64)
    peak = wide.max(-1)
    total = peak + np.log(np.exp(wide - peak[:, None]).sum(-1))
    return np.asarray(wide[np.arange(len(wide)), text[1:]] - total)


def error(found: list[NDArray[np.float64]], exact: list[NDArray[np.float64]]) -> float:
    """Root mean square over all tokens, in nats."""
    return float(np.sqrt(np.square(np.concatenate(found) - np.concatenate(exact)).mean()))


def load(path: Path, backend: str) -> CompiledModel:
    pytest.importorskip({"torch": "torch", "mlx": "mlx.core"}[backend])
    plan = ExecutionPlan(dtype="float32", device="cpu" if backend == "torch" else "auto")
    return load_model(path, backend=backend, plan=plan).model


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_as_exact_as_transformers_or_more(
    path: Path, exact: list[NDArray[np.float64]], theirs: float, backend: str
) -> None:
    model = load(path, backend)
    ours = error([logprobs(model.logits(text), text) for text in TEXTS], exact)
    assert ours <= theirs * (1 / 3 if path.parent.name.startswith("large") else 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_hardly_adds_up(
    path: Path, exact: list[NDArray[np.float64]], backend: str
) -> None:
    """Sums over 199 tokens; 3e-5 was observed."""
    requests = [ScoreRequest(tuple(text[:1]), tuple(text[1:])) for text in TEXTS]
    for index, score in load(path, backend).score(requests):
        assert abs(score.logprob - exact[index].sum()) <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_are_as_exact(path: Path, exact: list[NDArray[np.float64]], backend: str) -> None:
    """A prompt, a few tokens and single ones, beside another slot."""
    text, rows = TEXTS[0], []
    slots = load(path, backend).slots(2, 256)
    slots.feed([Feed(1, 0, tuple(TEXTS[1][:31]), 0)])
    for start, end in ((0, 150), (150, 155), *((i, i + 1) for i in range(155, 200))):
        feeds = [Feed(0, start, tuple(text[start:end]), end - start), Feed(1, 31, (7,), 1)]
        rows.append(slots.feed(feeds).rows(range(end - start)))
    found = logprobs(np.concatenate(rows), text)
    assert error([found], exact[:1]) <= 5e-6
    assert isinstance(slots, PersistentSlots)
    saved = list(slots.export(0, 20))
    assert any(name.endswith(ANCHORED_KEYS) for name, _ in saved)
    with pytest.raises(WeightError, match="saved"):
        slots.restore(1, ((name.replace(ANCHORED_KEYS, "keys"), x) for name, x in saved))


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_real_model_where_transformers_is_off(
    real_gguf: Path, datasets_dir: Path, backend: str
) -> None:
    """The tenth token of this text: transformers in float32 is off by 6.5e-3 nats."""
    checkpoint = open_checkpoint(real_gguf)
    essay = (datasets_dir / "text/needle-haystack/avg.txt").read_text(encoding="utf-8")
    tokenizer = checkpoint.tokenizer()
    text = [tokenizer.eot_id, *tokenizer.encode(essay[100:600])][:24]
    exact = logprobs(ReferenceModel(checkpoint.spec, checkpoint.weights).logits(text), text)
    found = logprobs(load(real_gguf, backend).logits(text), text)
    assert np.abs(found - exact).max() <= 5e-4
