"""Saved prompts continue as if they had been read; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.registry import get
from qwen2kit.engine.engine import Engine
from qwen2kit.engine.prompt_cache import load_prompt, model_fingerprint, save_prompt
from qwen2kit.engine.request import Request
from qwen2kit.errors import BackendError, WeightError
from qwen2kit.generate.sampling import Sampling
from qwen2kit.partial_file import write_text_atomically
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.safetensors_read import SafetensorsFile
from qwen2kit.weights.safetensors_write import write_safetensors
from qwen2kit.weights.tensor import from_numpy
from tests.conftest import random_weights, small_spec

PROMPT = tuple(range(3, 60))
SPEC = small_spec()


def model(backend: str, dtype: str = "float32") -> CompiledModel:
    pytest.importorskip("mlx.core" if backend == "mlx" else backend)
    made = get(backend).compile(SPEC, ExecutionPlan(device="cpu", dtype=dtype))
    made.load(random_weights(SPEC))
    return made


def text(engine: Engine, prompt: tuple[int, ...]) -> list[int]:
    engine.submit(Request(prompt, Sampling(max_new_tokens=8)))
    tokens = []
    while engine.busy:
        tokens += [event.token for event in engine.step()]
    return tokens


def saved(path: Path, backend: str, dtype: str = "float32") -> list[int]:
    with Engine(model(backend, dtype), slots=1, capacity=100) as engine:
        tokens = text(engine, PROMPT)
        assert save_prompt(path, engine, PROMPT, "a model") == len(PROMPT)
    return tokens


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_prompt_is_not_read_again(tmp_path: Path, backend: str, dtype: str) -> None:
    path = tmp_path / "prompt.safetensors"
    tokens = saved(path, backend, dtype)
    with Engine(model(backend, dtype), slots=2, capacity=100) as engine:
        assert load_prompt(path, engine, "a model") == PROMPT
        assert text(engine, PROMPT) == tokens
        assert engine.stats.cached_tokens == len(PROMPT) - 1  # the last one gives the first logits
        with Engine(model(backend, dtype), slots=1, capacity=100) as fresh:
            longer = (*PROMPT, 9, 8)
            assert text(engine, longer) == text(fresh, longer)


def test_every_mismatch_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    saved(path, "mlx")
    with Engine(model("mlx"), slots=1, capacity=100) as engine:
        for file, who, message in (
            (tmp_path / "absent", "a model", "no saved prompt"),
            (path, "another", "made by another model"),
        ):
            with pytest.raises(WeightError, match=message) as caught:
                load_prompt(file, engine, who)
            assert "\n" not in str(caught.value)
        other = tmp_path / "weights.safetensors"
        write_safetensors(other, [("tokens", from_numpy(np.zeros(3, dtype=np.int32)))])
        with pytest.raises(WeightError, match="not a saved prompt"):
            load_prompt(other, engine, "a model")
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(WeightError, match=r"cut\.safetensors"):
            load_prompt(cut, engine, "a model")
    with Engine(model("mlx", "bfloat16"), slots=1, capacity=100) as engine:
        with pytest.raises(WeightError, match="another dtype"):
            load_prompt(path, engine, "a model")
        assert text(engine, PROMPT)  # still usable
    with (
        Engine(model("mlx"), slots=1, capacity=40) as engine,
        pytest.raises(BackendError, match="57 tokens"),
    ):
        load_prompt(path, engine, "a model")


def test_token_ids_and_columns_must_agree(tmp_path: Path) -> None:
    path, lying = tmp_path / "prompt.safetensors", tmp_path / "lying.safetensors"
    saved(path, "mlx")
    file = SafetensorsFile(path)
    tensors = [(name, file.read(name)) for name in file.names() if name != "tokens"]
    short = from_numpy(np.array(PROMPT[:-1], dtype=np.int32))
    write_safetensors(lying, [("tokens", short), *tensors], metadata=file.metadata)
    with (
        Engine(model("mlx"), slots=1, capacity=100) as engine,
        pytest.raises(WeightError, match="not of 56 tokens"),
    ):
        load_prompt(lying, engine, "a model")


def test_a_prompt_nobody_ran_cannot_be_saved(tmp_path: Path) -> None:
    with (
        Engine(model("mlx"), slots=1, capacity=100) as engine,
        pytest.raises(BackendError, match="no slot holds this prompt"),
    ):
        save_prompt(tmp_path / "prompt.safetensors", engine, PROMPT, "a model")
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    """Equal for a copy elsewhere, different after one step of training."""
    prints = []
    for name, change in (("one", 0.0), ("copy", 0.0), ("trained", 1e-3)):
        folder = tmp_path / name
        folder.mkdir()
        config = to_hf_config(SPEC, dtype="float32")
        write_text_atomically(folder / "config.json", json.dumps(config))
        weights = random_weights(SPEC)
        tensors = [(n, from_numpy(weights.read(n).float32() + change)) for n in weights.names()]
        write_safetensors(folder / "model.safetensors", tensors)
        prints.append(model_fingerprint(open_checkpoint(folder)))
    assert prints[0] == prints[1] != prints[2]
