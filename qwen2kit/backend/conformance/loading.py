"""Cases about identity, refusing what cannot be run, loading and exporting weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from qwen2kit.backend.conformance.case import Case, require, require_close, require_raises
from qwen2kit.backend.conformance.models import (
    PLAN,
    TIED,
    TOLERANCE,
    UNTIED,
    loaded,
    tokens,
    weights,
)
from qwen2kit.backend.plan import TrainPlan
from qwen2kit.backend.protocol import PROTOCOL_VERSION, Backend, CompiledModel
from qwen2kit.backend.values import Capabilities
from qwen2kit.errors import BackendError, WeightError
from qwen2kit.spec.model import DualChunkSpec, ModelSpec, MoESpec, SlidingWindowSpec
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.spec.schema import EMBED_TOKENS, FINAL_NORM, LM_HEAD, schema
from qwen2kit.weights.affine import dequantize, quantize
from qwen2kit.weights.source import AffineTensor, MemorySource
from qwen2kit.weights.tensor import DType, HostTensor, from_float32

_MOE = MoESpec(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
)

_LAST_BIAS = [param.name for param in schema(UNTIED) if param.kind == "bias"][-1]


def _identity(backend: Backend) -> None:
    capabilities = backend.capabilities()
    require(isinstance(backend, Backend), "the object does not have the methods of Backend")
    require(backend.name, "name is empty")
    require(
        backend.protocol_version == PROTOCOL_VERSION,
        f"protocol_version is {backend.protocol_version}, expected {PROTOCOL_VERSION}",
    )
    require("float32" in capabilities.dtypes, "float32 is not among the dtypes")
    require(backend.devices(), "devices() is empty")
    require(backend.versions(), "versions() is empty")
    model = backend.compile(UNTIED, PLAN)
    require(isinstance(model, CompiledModel), "compile() gave no CompiledModel")
    require(model.spec == UNTIED, "model.spec is not the spec that was compiled")


def _refuses_unknown_device(backend: Backend) -> None:
    plan = replace(PLAN, device="no-such-device")
    require_raises(BackendError, lambda: backend.compile(UNTIED, plan), "unknown device")


def _refuses_mixtures(backend: Backend) -> None:
    spec = replace(UNTIED, moe=_MOE)
    require_raises(BackendError, lambda: backend.compile(spec, PLAN), "mixture of experts")


def _refuses_windows(backend: Backend) -> None:
    window = SlidingWindowSpec(enabled=True, sliding_window=8, max_window_layers=0)
    spec = replace(UNTIED, window=window)
    require_raises(BackendError, lambda: backend.compile(spec, PLAN), "sliding window")


def _refuses_training(backend: Backend) -> None:
    plan = replace(PLAN, train=TrainPlan())
    require_raises(BackendError, lambda: backend.compile(UNTIED, plan), "training plan")


def _never_ignores_dual_chunk(backend: Backend) -> None:
    """Refused at once, or run as full attention while the two are the same function."""
    spec = replace(UNTIED, dual_chunk=DualChunkSpec(chunk_size=16, local_size=4))
    try:
        model = backend.compile(spec, PLAN)
    except BackendError:
        return
    model.load(weights(UNTIED))
    expected = ReferenceModel(UNTIED, weights(UNTIED)).logits(tokens(17))
    require_close("logits up to chunk_size + 1", model.logits(tokens(17)), expected, TOLERANCE)
    require_raises(BackendError, lambda: model.logits(tokens(40)), "prompt beyond the chunk")


def _load_report(backend: Backend) -> None:
    report = backend.compile(TIED, PLAN).load(weights(TIED))
    stored = [weights(TIED).read(param.name).nbytes for param in schema(TIED)]
    require(
        report.tensors == len(stored), f"report says {report.tensors} tensors, not {len(stored)}"
    )
    require(report.bytes == sum(stored), f"report says {report.bytes} bytes, not {sum(stored)}")
    require(report.seconds >= 0, "negative load time")


def _changed(spec: ModelSpec, **changes: HostTensor | None) -> MemorySource:
    source = weights(spec)
    tensors = {name: source.read(name) for name in source.names()}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return MemorySource(tensors)


def _refuses_wrong_weights(backend: Backend) -> None:
    one = from_float32(np.ones(UNTIED.hidden_size + 1, dtype=np.float32), "float32")
    sources = {
        "missing tensor": _changed(UNTIED, **{_LAST_BIAS: None}),
        "missing head": _changed(UNTIED, **{LM_HEAD: None}),
        "unexpected tensor": _changed(UNTIED, **{"not.a.parameter": one}),
        "wrong shape": _changed(UNTIED, **{FINAL_NORM: one}),
    }
    for what, source in sources.items():
        model = backend.compile(UNTIED, PLAN)
        require_raises(WeightError, partial(model.load, source), what)


def _tolerates_duplicated_head(backend: Backend) -> None:
    source = _changed(TIED, **{LM_HEAD: weights(TIED).read(EMBED_TOKENS)})
    model = loaded(backend, TIED, source=source)
    expected = ReferenceModel(TIED, weights(TIED)).logits(tokens(5))
    require_close("logits", model.logits(tokens(5)), expected, TOLERANCE)


def _export_is_exact(backend: Backend, spec: ModelSpec, dtype: DType) -> None:
    source = MemorySource(
        {name: weights(spec).read(name).astype(dtype) for name in weights(spec).names()}
    )
    exported = list(loaded(backend, spec, source=source).export())
    names, expected = [name for name, _ in exported], [param.name for param in schema(spec)]
    require(names == expected, f"exported names or order differ from the schema: {names[:4]}...")
    for name, tensor in exported:
        same = np.array_equal(tensor.float32(), source.read(name).float32())
        require(same, f"{name} is not what was loaded, bit for bit")


def _reload_replaces(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    model.logits(tokens(4))
    model.load(weights(UNTIED, seed=1))
    expected = ReferenceModel(UNTIED, weights(UNTIED, seed=1)).logits(tokens(9))
    require_close("logits after a second load", model.logits(tokens(9)), expected, TOLERANCE)


class _QuantizedSource:
    """Matrices packed, the rest dense, as an MLX checkpoint presents them."""

    def __init__(self, dense: MemorySource, spec: ModelSpec, bits: int) -> None:
        self._dense = dense
        self._packed = {
            param.name: quantize(dense.read(param.name), bits=bits, group_size=64)
            for param in schema(spec)
            if param.quantizable
        }
        self.names, self.info = dense.names, dense.info

    def read(self, name: str) -> HostTensor:
        packed = self._packed.get(name)
        return self._dense.read(name) if packed is None else dequantize(packed)

    def affine(self, name: str) -> AffineTensor | None:
        return self._packed.get(name)


def _quantized(backend: Backend, spec: ModelSpec) -> None:
    for bits in backend.capabilities().quantized_bits:
        source = _QuantizedSource(weights(spec), spec, bits)
        expected = ReferenceModel(spec, source).logits(tokens(12))
        model = loaded(backend, spec, source=source)
        require_close(f"{bits}-bit logits", model.logits(tokens(12)), expected, 2 * TOLERANCE)
        for name, tensor in model.export():
            want = source.read(name).float32()
            require_close(f"{bits}-bit export of {name}", tensor.float32(), want, 1e-5)


def _quantizes(has: Capabilities) -> bool:
    return bool(has.quantized_bits)


CASES = (
    Case("backend/identity", _identity),
    Case("backend/refuses-unknown-device", _refuses_unknown_device),
    Case("backend/refuses-mixtures", _refuses_mixtures, lambda has: not has.moe),
    Case("backend/refuses-sliding-window", _refuses_windows, lambda has: not has.sliding_window),
    Case("backend/refuses-training", _refuses_training, lambda has: not has.trains),
    Case(
        "backend/never-ignores-dual-chunk",
        _never_ignores_dual_chunk,
        lambda has: not has.dual_chunk_attention,
    ),
    Case("load/report", _load_report),
    Case("load/refuses-wrong-weights", _refuses_wrong_weights),
    Case("load/tolerates-duplicated-tied-head", _tolerates_duplicated_head),
    Case("load/reload-replaces", _reload_replaces),
    Case("load/quantized-tied", partial(_quantized, spec=TIED), _quantizes),
    Case("load/quantized-untied", partial(_quantized, spec=UNTIED), _quantizes),
    Case("export/exact-tied", partial(_export_is_exact, spec=TIED, dtype="float32")),
    Case("export/exact-untied", partial(_export_is_exact, spec=UNTIED, dtype="float32")),
    Case("export/exact-from-bfloat16", partial(_export_is_exact, spec=UNTIED, dtype="bfloat16")),
)
