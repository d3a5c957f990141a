"""Loading and exporting: canonical in, canonical out, packed stays packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from qwen2kit.backend.plan import ExecutionPlan  # noqa: E402
from qwen2kit.engine.generate import generate  # noqa: E402
from qwen2kit.errors import BackendError, WeightError  # noqa: E402
from qwen2kit.generate.sampling import Sampling  # noqa: E402
from qwen2kit.spec.reference import ReferenceModel  # noqa: E402
from qwen2kit.spec.schema import EMBED_TOKENS, LM_HEAD, schema  # noqa: E402
from qwen2kit.weights.checkpoint import open_checkpoint  # noqa: E402
from qwen2kit.weights.convert import convert  # noqa: E402
from qwen2kit.weights.source import (  # noqa: E402
    AffineTensor,
    MemorySource,
    TensorInfo,
    WeightSource,
)
from qwen2kit.weights.tensor import HostTensor  # noqa: E402
from qwen2kit_mlx.backend import MLXBackend  # noqa: E402
from tests.conftest import random_weights, small_spec  # noqa: E402
from tests.tiny_checkpoint import write_tiny_checkpoint  # noqa: E402
from tests.unit.mlx.setup_mlx import (  # noqa: E402
    KERNELS,
    SPECS,
    PackedSource,
    assert_dense,
    model,
)

TOKENS = np.random.default_rng(4).integers(0, 199, 17).tolist()
GATE_0 = next(p.name for p in schema(SPECS["tied"]) if "gate_proj" in p.name)
Q_0 = next(p.name for p in schema(SPECS["tied"]) if "q_proj.weight" in p.name)


def all_packed(tied: bool, bits: int, group_size: int = 32) -> PackedSource:
    spec = small_spec(tied=tied)
    names = [param.name for param in schema(spec) if param.quantizable]
    return PackedSource(random_weights(spec), dict.fromkeys(names, (bits, group_size)))


@pytest.mark.parametrize("name", ["tied", "untied", "wide heads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_gives_back_what_was_loaded(name: str, dtype: str) -> None:
    spec = SPECS[name]
    base = random_weights(spec)
    source = MemorySource({n: base.read(n).astype(dtype) for n in base.names()})  # type: ignore[arg-type]
    exported = list(model(spec, source, dtype=getattr(mx, dtype)).export())
    assert [n for n, _ in exported] == [param.name for param in schema(spec)]
    for tensor_name, tensor in exported:
        stored = source.read(tensor_name)
        assert (tensor.dtype, tensor.shape) == (stored.dtype, stored.shape)
        assert bytes(tensor.data) == bytes(stored.data)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_packed_weights_compute_like_their_dense_values(bits: int, kernels: str) -> None:
    source = all_packed(tied=bits % 4 == 0, bits=bits)
    spec = small_spec(tied=bits % 4 == 0)
    ours = model(spec, source, kernels)
    reference = ReferenceModel(spec, source)
    logits = reference.logits(TOKENS)
    assert np.abs(ours.logits(TOKENS) - logits).max() < 2e-5 * np.abs(logits).max()
    events = list(generate(ours, [TOKENS], Sampling(max_new_tokens=4)))
    tokens = list(TOKENS)
    for event in events:
        assert event.token == int(np.argmax(reference.logits(tokens)[-1]))
        tokens.append(event.token)
    for name, tensor in ours.export():
        assert_dense(tensor, source.read(name))


def test_packed_weights_stay_packed() -> None:
    spec = small_spec(vocab_size=20_000)
    names = [param.name for param in schema(spec) if param.quantizable]
    source = PackedSource(random_weights(spec), dict.fromkeys(names, (4, 32)))
    before = mx.get_active_memory()
    loaded = model(spec, source)
    held = mx.get_active_memory() - before
    assert held < 20_000 * 64 * 4 * 0.25
    assert loaded.spec is spec


@pytest.mark.parametrize("kernels", KERNELS)
def test_mixed_formats_in_one_layer(kernels: str) -> None:
    """q in 8 bits, k dense, v in 4; gate in groups of 64, up of 32."""
    spec = SPECS["untied"]
    modules = {"q_proj": (8, 32), "v_proj": (4, 32), "gate_proj": (4, 64), "up_proj": (4, 32)}
    formats = {
        param.name: modules[param.name.split(".")[-2]]
        for param in schema(spec)
        if param.kind == "linear" and param.name.split(".")[-2] in modules
    }
    source = PackedSource(random_weights(spec), formats | {LM_HEAD: (6, 32)})
    ours = model(spec, source, kernels)
    expected = ReferenceModel(spec, source).logits(TOKENS)
    assert np.abs(ours.logits(TOKENS) - expected).max() < 2e-5 * np.abs(expected).max()
    for name, tensor in ours.export():
        assert_dense(tensor, source.read(name))


def test_a_stored_head_of_a_tied_model_is_ignored() -> None:
    spec = SPECS["tied"]
    base = random_weights(spec)
    doubled = {n: base.read(n) for n in base.names()} | {LM_HEAD: base.read(EMBED_TOKENS)}
    ours = model(spec, MemorySource(doubled))
    assert np.array_equal(ours.logits(TOKENS), model(spec, base).logits(TOKENS))


def test_report_counts_tensors_and_bytes() -> None:
    spec = SPECS["untied"]
    source = random_weights(spec)
    report = MLXBackend().compile(spec, ExecutionPlan(device="cpu")).load(source)
    assert report.tensors == len(source.names())
    assert report.bytes == sum(source.read(n).nbytes for n in source.names())


def test_misfits_are_refused_by_name() -> None:
    spec = SPECS["tied"]
    base = random_weights(spec)
    partial = {n: base.read(n) for n in base.names() if n != Q_0}
    with pytest.raises(WeightError, match=f"missing: {Q_0}"):
        model(spec, MemorySource(partial))
    with pytest.raises(WeightError, match="wrong shape"):
        model(small_spec(intermediate_size=128), base)


@pytest.mark.parametrize("lie", [{"bits": 8}, {"bits": 5}, {"group_size": 16}, {"group_size": 64}])
def test_mislabelled_packing_is_refused_by_name(lie: dict[str, int]) -> None:
    source = all_packed(tied=True, bits=4)
    source.relabel(GATE_0, **lie)
    with pytest.raises(WeightError, match=GATE_0):
        model(SPECS["tied"], source)


def test_nothing_runs_before_load() -> None:
    empty = MLXBackend().compile(SPECS["tied"], ExecutionPlan(device="cpu"))
    for use in (
        lambda: empty.logits([1]),
        lambda: empty.slots(1, 8),
        lambda: empty.score([]),
        lambda: list(empty.export()),
    ):
        with pytest.raises(BackendError, match="call load first"):
            use()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_are_read_by_mlx_itself(
    dtype: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense and packed directories, each file opened once; the same tensors to the bit."""
    write_tiny_checkpoint(tmp_path / "hf", head_dim=32)
    convert(open_checkpoint(tmp_path / "hf"), tmp_path / "mlx", to="mlx", quantize_bits=4,
            group_size=32)  # fmt: skip
    opened: list[str] = []
    load = mx.load

    def counted(path: str, **options: object) -> object:
        opened.append(path)
        return load(path, **options)

    monkeypatch.setattr(mx, "load", counted)
    for form in ("hf", "mlx"):
        checkpoint = open_checkpoint(tmp_path / form)
        opened.clear()
        read = model(checkpoint.spec, checkpoint.weights, kernels, getattr(mx, dtype))
        assert len(opened) == 1
        copied = model(checkpoint.spec, Nowhere(checkpoint.weights), kernels, getattr(mx, dtype))
        assert len(opened) == 1
        for (name, got), (_, expected) in zip(read.export(), copied.export(), strict=True):
            assert np.array_equal(got.raw(), expected.raw()), name


class Nowhere:
    """A source whose tensors do not say which file they come from."""

    def __init__(self, base: WeightSource) -> None:
        self._base = base

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def info(self, name: str) -> TensorInfo:
        return self._base.info(name)

    def read(self, name: str) -> HostTensor:
        return replace(self._base.read(name), origin=None)

    def affine(self, name: str) -> AffineTensor | None:
        packed = self._base.affine(name)
        if packed is None:
            return None
        parts = (packed.packed, packed.scales, packed.biases)
        return AffineTensor(
            *(replace(t, origin=None) for t in parts), packed.bits, packed.group_size
        )
