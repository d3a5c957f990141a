"""The comparison itself: transformers and mlx-lm against the float64 reference, and against
models that are wrong in a known layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen2kit.errors import BackendError, ConfigError, ParityError
from qwen2kit.parity.compare import compare_all
from qwen2kit.parity.layers import first_divergence, state_name
from qwen2kit.parity.peers import Peer, PeerLoader, choose
from qwen2kit.parity.prompts import Prompt, prompt_set
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.weights.checkpoint import Checkpoint, open_checkpoint
from qwen2kit.weights.source import MemorySource
from qwen2kit.weights.tensor import from_float32
from tests.tiny_checkpoint import write_tiny_checkpoint


class Reference:
    """The NumPy reference as an implementation; ``break_tensor`` shifts one parameter."""

    def __init__(self, name: str = "reference", break_tensor: str = "", wrong_cache: int = 0):
        self.name = name
        self._break = break_tensor
        self._wrong_cache = wrong_cache

    def refuses(self, checkpoint: Checkpoint, dtype: str) -> str:
        return ""

    def load(self, checkpoint: Checkpoint, dtype: str) -> Peer:
        weights = checkpoint.weights
        if self._break:
            tensors = {name: weights.read(name) for name in weights.names()}
            tensors[self._break] = from_float32(tensors[self._break].float32() + 0.05, "float32")
            weights = MemorySource(tensors)
        return _LoadedReference(self.name, checkpoint, weights, self._wrong_cache)


class _LoadedReference:
    def __init__(self, name: str, checkpoint: Checkpoint, weights: object, wrong: int) -> None:
        self.name = name
        self._wrong = wrong
        self._model = ReferenceModel(checkpoint.spec, weights)  # type: ignore[arg-type]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return self._model.logits(tokens).astype(np.float32)

    def greedy(self, tokens: Sequence[int], count: int, stop: Sequence[int]) -> list[int]:
        output: list[int] = []
        while len(output) < count and not (output and output[-1] in stop):
            order = np.argsort(self._model.logits([*tokens, *output])[-1])
            late = self._wrong and len(output) >= self._wrong
            output.append(int(order[-2 if late else -1]))
        return output

    def hidden_states(self, tokens: Sequence[int]) -> np.ndarray:
        return self._model.hidden_states(tokens).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(path)
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def prompts(checkpoint: Checkpoint) -> list[Prompt]:
    return prompt_set(checkpoint.tokenizer(), context=60)[:4]


def _loaders(checkpoint: Checkpoint, *peers: str) -> tuple[PeerLoader, ...]:
    choice = choose(checkpoint, backends=(), peers=peers, dtype="float32")
    assert not choice.not_applicable
    return choice.loaders


@pytest.mark.parametrize(
    ("peer", "module"), [("transformers", "transformers"), ("mlx-lm", "mlx_lm")]
)
def test_real_peers_agree_with_the_reference(
    checkpoint: Checkpoint, prompts: list[Prompt], peer: str, module: str
) -> None:
    pytest.importorskip(module)
    loaders = (Reference(), *_loaders(checkpoint, peer))
    (pair,) = compare_all(checkpoint, loaders, prompts, greedy_tokens=12, tolerance=1e-3)
    assert (pair.first, pair.second, pair.passed) == ("reference", peer, True)
    assert 0 < pair.total.max_abs < 1e-4
    assert pair.total.top1_agreement == 1
    assert all(run.identical for run in pair.greedy.values())
    assert max(run.length for run in pair.greedy.values()) == 12
    assert pair.divergence is None


def test_a_wrong_layer_is_found(checkpoint: Checkpoint, prompts: list[Prompt]) -> None:
    pytest.importorskip("transformers")
    broken = Reference("broken", "model.layers.1.self_attn.k_proj.bias")
    broken2 = Reference("broken-v", "model.layers.2.mlp.down_proj.weight")
    loaders = (*_loaders(checkpoint, "transformers"), broken, broken2)
    results = compare_all(checkpoint, loaders, prompts[:2], greedy_tokens=0)
    found = {(r.first, r.second): r.divergence.where for r in results if r.divergence}
    assert found == {
        ("transformers", "broken"): "layer 1",
        ("transformers", "broken-v"): "layer 2",
        ("broken", "broken-v"): "layer 1",
    }
    assert not any(result.passed for result in results)
    json.dumps([result.to_dict() for result in results], allow_nan=False)


def test_wrong_decoding_is_found_though_logits_agree(
    checkpoint: Checkpoint, prompts: list[Prompt]
) -> None:
    loaders = (Reference(), Reference("cache-bug", wrong_cache=3))
    (pair,) = compare_all(checkpoint, loaders, prompts[:1], greedy_tokens=8)
    run = pair.greedy[prompts[0].name]
    assert pair.total.max_abs == 0
    assert (run.common, run.identical) == (3, False)
    assert run.gap > 2e-3
    assert not pair.passed


def test_choice_names_who_is_left_out(checkpoint: Checkpoint) -> None:
    pytest.importorskip("transformers")
    gguf = replace(checkpoint, format="gguf", path=Path("model.gguf"))
    choice = choose(gguf, backends=(), peers=None, dtype="float32")
    assert set(choice.not_applicable) >= {"transformers", "mlx-lm"}
    assert "qwen2kit convert" in choice.not_applicable["transformers"]
    with pytest.raises(BackendError, match="unknown peer 'vllm'"):
        choose(checkpoint, backends=(), peers=("vllm",), dtype="float32")
    with pytest.raises(BackendError, match="unknown backend 'tpu'"):
        choose(checkpoint, backends=("tpu",), peers=(), dtype="float32")
    with pytest.raises(ConfigError, match="twice"):
        choose(checkpoint, backends=("torch", "torch"), peers=(), dtype="float32")


def test_transformers_hidden_states_equal_the_reference(checkpoint: Checkpoint) -> None:
    pytest.importorskip("transformers")
    (loader,) = _loaders(checkpoint, "transformers")
    tokens = [5, 9, 100, 7]
    theirs = loader.load(checkpoint, "float32").hidden_states(tokens)
    ours = Reference().load(checkpoint, "float32").hidden_states(tokens)
    assert theirs is not None
    assert ours is not None
    assert theirs.shape == (checkpoint.spec.num_hidden_layers + 2, 4, 64)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_first_divergence() -> None:
    a = np.ones((5, 3, 8), np.float32)
    b = a.copy()
    assert first_divergence(a, b).first is None
    b[3:] += 0.01
    assert first_divergence(a, b).where == "layer 2"
    b[2, 0, 0] = np.nan
    assert first_divergence(a, b).where == "layer 1"
    assert [state_name(i, 5) for i in (0, 4)] == ["embedding", "final norm"]
    with pytest.raises(ParityError, match="shapes"):
        first_divergence(a, b[1:])
