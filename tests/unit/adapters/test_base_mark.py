"""Adapters know their base again in any format, and other models of equal shapes from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2kit.adapters.base_mark import KEY, is_other_model, mark
from qwen2kit.adapters.directory import convert_adapter, open_adapter, write_adapter
from qwen2kit.adapters.merge import open_model
from qwen2kit.spec.schema import FINAL_NORM
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.convert import convert
from qwen2kit.weights.safetensors_read import SafetensorsFile
from qwen2kit.weights.tensor import HostTensor, from_numpy
from tests.packed_checkpoint import Kind, write_packed_checkpoint
from tests.tiny_adapter import random_adapter
from tests.tiny_checkpoint import write_tiny_checkpoint


class Changed:
    """A source whose final norm is ``change`` of the original."""

    def __init__(self, source: Any, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self.source, self.change = source, change

    def read(self, name: str) -> HostTensor:
        assert name == FINAL_NORM
        return from_numpy(self.change(self.source.read(name).float32()).astype(np.float32))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A base, ``base``, and an adapter of it, ``adapter``."""
    write_tiny_checkpoint(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    adapter = replace(random_adapter(base.spec), base_mark=mark(base.weights), base_model="org/it")
    write_adapter(adapter, tmp_path / "adapter", to="hf", force=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("f32", {"to": "hf", "dtype": "float32"}),
        ("bf16", {"to": "hf", "dtype": "bfloat16"}),
        ("f16", {"to": "hf", "dtype": "float16"}),
        ("q8.gguf", {"to": "gguf", "gguf_type": "q8_0"}),
        ("f16.gguf", {"to": "gguf", "gguf_type": "f16"}),
        ("mlx", {"to": "mlx", "quantize_bits": 4, "group_size": 32}),
        ("mlx2", {"to": "mlx", "quantize_bits": 2, "group_size": 32, "dtype": "float16"}),
    ],
)
def test_the_base_in_another_format_is_the_base(
    name: str, options: dict[str, Any], trained: Path
) -> None:
    out = trained / name
    convert(open_checkpoint(trained / "base"), out, **options)
    assert open_model(str(out), str(trained / "adapter")).notes == ()
    again = trained / "again"  # twice rounded
    convert(open_checkpoint(out), again, to="hf", dtype="bfloat16")
    assert open_model(str(again), str(trained / "adapter")).notes == ()


def test_another_model_of_equal_shapes_is_told(trained: Path) -> None:
    write_tiny_checkpoint(trained / "other", seed=9)
    found = open_model(str(trained / "other"), str(trained / "adapter"))
    (note,) = found.notes
    assert f"was not trained on {trained / 'other'} but on org/it" in note
    assert "\n" not in note
    write_adapter(random_adapter(found.spec), trained / "unmarked", to="hf", force=False)
    assert open_model(str(trained / "other"), str(trained / "unmarked")).notes == ()


def test_the_mark_survives_conversion_of_the_adapter(trained: Path) -> None:
    convert_adapter(open_adapter(trained / "adapter"), trained / "mlx", to="mlx", force=False)
    convert_adapter(open_adapter(trained / "mlx"), trained / "hf", to="hf", force=False)
    expected = mark(open_checkpoint(trained / "base").weights)
    assert open_adapter(trained / "hf").base_mark == expected
    metadata = SafetensorsFile(trained / "hf" / "adapter_model.safetensors").metadata
    assert metadata == {"format": "pt", KEY: expected}


def test_how_far_a_norm_may_be_off(trained: Path) -> None:
    source = open_checkpoint(trained / "base").weights
    varied = Changed(source, lambda w: np.linspace(0.01, 30, w.size))
    given = mark(varied)  # type: ignore[arg-type]

    def differs(change: Callable[[np.ndarray], np.ndarray]) -> bool:
        return is_other_model(given, Changed(varied, change))  # type: ignore[arg-type]

    assert not differs(lambda w: w * (1 + 2.0**-8))  # bfloat16's rounding
    assert differs(lambda w: w * (1 + 2.0**-7))
    assert not differs(lambda w: np.ones_like(w))  # moved into the head: nobody can tell
    for damaged in (None, "", "????", given[:-8], "AAAA"):
        assert not is_other_model(damaged, source)


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_packed_bases(kind: str, tmp_path: Path) -> None:
    write_packed_checkpoint(tmp_path / "packed", Kind(method=kind))
    packed = open_checkpoint(tmp_path / "packed").weights
    assert not is_other_model(mark(packed), packed)
