"""Roofs against counts made by hand, random weights, and what the report holds."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.registry import get, installed
from qwen2kit.backend.slots import Slots
from qwen2kit.bench import measure
from qwen2kit.bench.measure import measure_decode, measure_prefill, measure_throughput
from qwen2kit.bench.prompts import random_prompts
from qwen2kit.bench.random_weights import RandomSource
from qwen2kit.bench.roof import (
    Held,
    Roof,
    decode_flops,
    decode_weight_bytes,
    prefill_flops,
    roof_of,
)
from qwen2kit.bench.run import Subject, Workload, bench, check_streams, measured_roof
from qwen2kit.errors import BackendError, ConfigError, WeightError
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.presets import preset
from qwen2kit.spec.schema import schema
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.convert import convert
from qwen2kit.weights.match import check_fits
from qwen2kit.weights.safetensors_read import SafetensorsFile
from tests.conftest import small_spec
from tests.tiny_checkpoint import write_tiny_checkpoint


def test_random_weights_fit_and_look_normal() -> None:
    spec = preset("tiny")
    source = RandomSource(spec, "bfloat16")
    check_fits(spec, source)
    for param in schema(spec):
        values = source.read(param.name).float32()
        assert values.shape == param.shape
        assert source.info(param.name).dtype == "bfloat16"
        if param.init == "normal":
            assert abs(values.mean()) < 0.001
            assert values.std() == pytest.approx(0.02, rel=0.05)
            rows = values.reshape(-1, values.shape[-1])
            assert len(np.unique(rows, axis=0)) == len(rows)
        else:
            assert (values == (param.init == "ones")).all()
    with pytest.raises(WeightError, match="no tensor"):
        source.read("nothing")


def test_long_tensors_go_on_where_the_values_end() -> None:
    spec = preset("qwen2-0.5b")
    source = RandomSource(spec, "float32")
    first = schema(spec)[0]
    values = source.read(first.name).float32().reshape(-1)
    assert (values[1_048_573 : 2 * 1_048_573] == values[:1_048_573]).all()
    second = next(p for p in schema(spec)[1:] if p.init == "normal")
    assert (source.read(second.name).float32().reshape(-1)[:9] != values[:9]).any()


def test_weight_bytes_of_a_step() -> None:
    """7B: 7,615,616,512 parameters less an embedding of 152,064 x 3,584; 0.5B is tied."""
    for name, elements in (
        ("qwen2-7b", 7_615_616_512 - 152_064 * 3_584),
        ("qwen2-0.5b", 494_032_768),
    ):
        spec = preset(name)
        source = RandomSource(spec, "bfloat16")
        assert decode_weight_bytes(spec, source, Held("bfloat16")) == 2 * elements


def test_quantised_weights_count_as_they_are_held(tmp_path: Path) -> None:
    """The bytes of the file MLX reads; dense where the backend expands it; torch's own 4 bits."""
    write_tiny_checkpoint(tmp_path / "hf", hidden_size=128)
    convert(open_checkpoint(tmp_path / "hf"), tmp_path / "mlx", to="mlx", quantize_bits=4)
    checkpoint = open_checkpoint(tmp_path / "mlx")
    spec, source = checkpoint.spec, checkpoint.weights
    file = SafetensorsFile(tmp_path / "mlx" / "model.safetensors")
    stored = sum(file.read(name).nbytes for name in file.names())
    norms = sum(p.size for p in schema(spec) if not p.quantizable)
    narrow = sum(file.read(n).nbytes for n in file.names() if "norm" in n or n.endswith("j.bias"))
    packed = decode_weight_bytes(spec, source, Held("float32", packed=(4,)))
    assert packed == stored - narrow + 4 * norms
    dense = decode_weight_bytes(spec, source, Held("float32"))
    assert dense == 4 * sum(p.size for p in schema(spec))
    layers = sum(p.size for p in schema(spec) if p.kind == "linear")
    own = decode_weight_bytes(spec, source, Held("float32", weight_bits=4))
    assert dense - own == layers * 4 - layers // 2 - layers // 64 * 8
    roofs = [
        roof_of(spec, source, Held("float32", cache_bits=bits), bandwidth=1.0, matmul=1.0)
        for bits in (None, 8)
    ]
    assert roofs[0].cache == 4 * roofs[1].cache


def test_flops_are_those_torch_counts_in_transformers() -> None:
    """It counts attention without the causal half, and the head at every token."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    spec, tokens = small_spec(), 7
    config = transformers.Qwen2Config(**to_hf_config(spec, dtype="float32"))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(torch.zeros(1, tokens, dtype=torch.int64))
    width = spec.num_attention_heads * spec.head_dim
    half = 2 * spec.num_hidden_layers * width * tokens * tokens
    head = 2 * spec.vocab_size * spec.hidden_size
    assert counter.get_total_flops() == prefill_flops(spec, tokens) + half + (tokens - 1) * head
    last = prefill_flops(spec, tokens) - prefill_flops(spec, tokens - 1) + head
    assert decode_flops(spec, tokens - 0.5) == pytest.approx(last)


def test_the_roof_is_the_slower_limit() -> None:
    spec = preset("tiny")
    roof = Roof(bandwidth=100.0, matmul=1e30, weights=1000, cache=10, spec=spec)
    assert roof.decode(context=5, streams=2) == (1000 + 2 * 5 * 10) / 100
    roof = Roof(bandwidth=1e30, matmul=1e6, weights=1000, cache=10, spec=spec)
    assert roof.decode(5, 2) == pytest.approx(2 * decode_flops(spec, 5) / 1e6)
    assert roof.prefill(9) == prefill_flops(spec, 9) / 1e6


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_measurements_by_a_clock_that_ticks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The clock moves one second per look: once per step of the engine, once per start."""
    if name not in installed():
        pytest.skip(f"{name} is not installed")
    spec = preset("tiny")
    model = get(name).compile(spec, ExecutionPlan(dtype="float32"))
    model.load(RandomSource(spec, "float32"))
    ticks = count()
    monkeypatch.setattr(measure, "perf_counter", lambda: float(next(ticks)))
    prompts = random_prompts(spec.vocab_size)
    found = measure_prefill(model, 20, prompts, 2, None)
    assert found.tokens == 20
    assert found.seconds >= 1
    decode = measure_decode(model, 5, 6, prompts, 2, None)
    assert (decode.context, decode.new, decode.drafted) == (5, 6, 0)
    assert decode.tokens_per_second == 1
    many = measure_throughput(model, 3, 5, 6, prompts, None)
    assert many.slots == 3
    assert many.decode_tokens_per_second == 3
    assert many.tokens_per_second == 18 / many.seconds
    assert many.first_token[0] <= many.first_token[2] <= many.seconds
    assert many.between_tokens == (1.0, 1.0, 1.0)


class _NoRoom:
    """A model whose memory is too short for many streams."""

    limit = 512

    def __init__(self, model: CompiledModel, most: int) -> None:
        self.spec, self._model, self._most = model.spec, model, most

    def slots(self, count: int, capacity: int) -> Slots:
        if count > self._most:
            raise RuntimeError("out of\nmemory")
        return self._model.slots(count, capacity)


def test_a_section_that_fails_is_left_out() -> None:
    if not installed():
        pytest.skip("no backend installed")
    backend, spec = get(installed()[0]), preset("tiny")
    plan, source = ExecutionPlan(dtype="float32"), RandomSource(spec, "float32")
    model = backend.compile(spec, plan)
    report = model.load(source)

    def measured(most: int) -> dict[str, Any]:
        subject = Subject(
            name="tiny", backend=backend, model=_NoRoom(model, most), plan=plan,  # type: ignore[arg-type]
            weights=source, prompts=random_prompts(spec.vocab_size),
        )  # fmt: skip
        work = Workload(prefill=(8,), contexts=(8,), streams=(1, 4), prompt=8, new=4, repeats=1)
        return bench(subject, work, report=report, roof=None, notice=lambda label: None)

    document = measured(1)
    assert document["failures"] == ["4 streams: out of memory"]
    assert [entry["streams"] for entry in document["throughput"]] == [1]
    with pytest.raises(BackendError, match="nothing could be measured; prefill of 8 tokens: out"):
        measured(0)


def test_more_streams_than_anyone_waits_for_are_refused() -> None:
    roof = Roof(bandwidth=1e9, matmul=1e9, weights=1000, cache=10, spec=preset("tiny"))
    work = Workload()
    check_streams(roof, 64, work)
    with pytest.raises(
        ConfigError, match=r"100000000 streams of 128 and 64 .* --streams (\d+)"
    ) as e:
        check_streams(roof, 100_000_000, work)
    most = int(str(e.value).split("--streams ")[1].split()[0])
    assert 64 < most < 100_000_000
    check_streams(roof, most, work)


def test_they_are_refused_before_anything_is_loaded() -> None:
    spec = preset("qwen2-7b")
    meter = SimpleNamespace(dtype="bfloat16", copy_bandwidth=lambda: 3e12, matmul_rate=lambda: 8e14)
    backend = SimpleNamespace(
        meter=lambda plan: meter, capabilities=lambda: SimpleNamespace(quantized_bits=())
    )
    model = SimpleNamespace(spec=spec, limit=4096)  # it cannot even load
    subject = Subject(
        name="x", backend=backend, model=model, plan=ExecutionPlan(),  # type: ignore[arg-type]
        weights=RandomSource(spec, "bfloat16"), prompts=random_prompts(10),
    )  # fmt: skip
    assert measured_roof(subject, Workload(), lambda label: None) is not None
    with pytest.raises(ConfigError, match="1000000 streams"):
        measured_roof(subject, Workload(streams=(1_000_000,)), lambda label: None)
    with pytest.raises(ConfigError, match="the longest sequence"):
        measured_roof(subject, Workload(prefill=(5000,)), lambda label: None)


@pytest.mark.parametrize("field", ["repeats", "prompt", "new"])
def test_numbers_beyond_reason_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match="make no sense"):
        Workload(**{field: 10**400})


def test_prompts_differ() -> None:
    prompts = random_prompts(50)
    first, second = prompts(30), prompts(30)
    assert len(first) == len(second) == 30
    assert first != second
    assert max(first + second) < 50
