"""Loading, exporting, and every refusal of the torch backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import Backend, CompiledModel, ScoreRequest
from qwen2kit.backend.registry import get
from qwen2kit.engine.generate import generate
from qwen2kit.errors import BackendError, WeightError
from qwen2kit.generate.sampling import Sampling
from qwen2kit.spec.model import DualChunkSpec, MoESpec, RoPESpec, YarnScaling
from qwen2kit.spec.schema import FINAL_NORM, schema
from qwen2kit.weights.source import MemorySource
from qwen2kit.weights.tensor import HostTensor, from_float32
from tests.conftest import random_weights, small_spec
from tests.unit.torch.peers import SPECS, TOKENS, ours

torch = pytest.importorskip("torch")

MOE = MoESpec(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)


def test_registered_and_complete() -> None:
    backend = get("torch")
    assert isinstance(backend, Backend)
    assert isinstance(backend.compile(small_spec(), ExecutionPlan()), CompiledModel)
    assert backend.versions()["torch"] == torch.__version__
    assert backend.devices()[-1].name == "cpu"
    assert backend.capabilities().sliding_window
    assert not backend.capabilities().moe


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("generated_before", [False, True])
def test_export_returns_what_was_loaded(name: str, dtype: Any, generated_before: bool) -> None:
    spec = SPECS[name]
    exact = random_weights(spec)
    source = MemorySource({n: exact.read(n).astype(dtype) for n in exact.names()})
    model = ours(spec, source, dtype=dtype)
    if generated_before:
        list(generate(model, [TOKENS], Sampling(max_new_tokens=3)))
    exported = list(model.export())
    assert [n for n, _ in exported] == [param.name for param in schema(spec)]
    for n, tensor in exported:
        assert tensor.dtype == dtype
        assert tensor.shape == source.read(n).shape
        assert bytes(tensor.data) == bytes(source.read(n).data)


def test_load_rounds_to_the_plan_and_reports_what_it_read() -> None:
    spec = SPECS["tied"]
    source = random_weights(spec)
    model = get("torch").compile(spec, ExecutionPlan(device="cpu", dtype="bfloat16"))
    report = model.load(source)
    assert report.tensors == len(schema(spec))
    assert report.bytes == sum(4 * param.size for param in schema(spec))
    for name, tensor in model.export():
        assert bytes(tensor.data) == bytes(source.read(name).astype("bfloat16").data)


def test_read_only_buffers_are_shared_and_never_written() -> None:
    spec = SPECS["tied"]
    exact = random_weights(spec)
    frozen = MemorySource(
        {
            n: HostTensor("float32", exact.read(n).shape, memoryview(bytes(exact.read(n).data)))
            for n in exact.names()
        }
    )
    model = ours(spec, frozen)
    before = model.logits(TOKENS)
    list(generate(model, [TOKENS], Sampling(max_new_tokens=4)))
    embedding = model.module.model.embed_tokens.weight
    first = np.frombuffer(frozen.read("model.embed_tokens.weight").data, np.uint8)
    assert embedding.data_ptr() == first.ctypes.data
    assert np.array_equal(model.logits(TOKENS), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_again_replaces_everything(dtype: str) -> None:
    spec = SPECS["tied"]
    model = ours(spec, random_weights(spec, seed=1), dtype=dtype)
    list(generate(model, [TOKENS], Sampling(max_new_tokens=3)))
    model.load(random_weights(spec))
    assert np.array_equal(model.logits(TOKENS), ours(spec, dtype=dtype).logits(TOKENS))


def test_misfitting_weights_are_refused() -> None:
    spec = SPECS["tied"]
    exact = random_weights(spec)
    tensors = {n: exact.read(n) for n in exact.names()}
    model = get("torch").compile(spec, ExecutionPlan(device="cpu"))
    for broken, message in (
        ({n: t for n, t in tensors.items() if n != FINAL_NORM}, "missing"),
        (tensors | {"extra": tensors[FINAL_NORM]}, "unexpected"),
        (tensors | {FINAL_NORM: from_float32(np.ones(3, np.float32), "float32")}, "wrong shape"),
    ):
        with pytest.raises(WeightError, match=message):
            model.load(MemorySource(broken))
    with pytest.raises(BackendError, match="no weights"):
        model.logits(TOKENS)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "tpu"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(BackendError, match=r"no device .* available: .*cpu"):
        get("torch").compile(small_spec(), ExecutionPlan(device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_cuda_is_refused() -> None:
    with pytest.raises(BackendError, match="available: cpu"):
        get("torch").compile(small_spec(), ExecutionPlan(device="cuda"))


def test_mixtures_are_refused_by_name() -> None:
    with pytest.raises(BackendError, match="mixture-of-experts"):
        get("torch").compile(small_spec(moe=MOE), ExecutionPlan(device="cpu"))


def test_dual_chunk_runs_only_where_it_is_full_attention() -> None:
    dual = DualChunkSpec(chunk_size=20, local_size=4)
    model = ours(small_spec(dual_chunk=dual))
    assert np.array_equal(model.logits([*TOKENS, 1]), ours(small_spec()).logits([*TOKENS, 1]))
    with pytest.raises(BackendError, match="dual chunk"):
        model.logits([*TOKENS, 1, 2])
    events = list(generate(model, [TOKENS[:15]], Sampling(max_new_tokens=50)))
    assert len(events) == 6
    with pytest.raises(BackendError, match="dual chunk"):
        model.module(torch.tensor([[*TOKENS, 1, 2]]))


@pytest.mark.parametrize("length", [0, 257])
def test_max_seq_len_must_fit(length: int) -> None:
    with pytest.raises(BackendError, match="max_seq_len"):
        get("torch").compile(small_spec(), ExecutionPlan(device="cpu", max_seq_len=length))


def test_yarn_extends_the_limit() -> None:
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=16)
    model = ours(small_spec(max_position_embeddings=16, rope=RoPESpec(scaling=scaling)))
    assert model.logits(TOKENS * 3).shape == (60, 199)
    with pytest.raises(BackendError, match="takes 64"):
        model.logits(TOKENS * 4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "empty"), ([199], "token id 199"), ([-1, 3], "token id -1"), ([1] * 257, "takes 256")],
)
def test_bad_input_is_refused(tokens: list[int], message: str) -> None:
    model = ours(SPECS["tied"])
    for call in (
        lambda: model.logits(tokens),
        lambda: model.hidden_states(tokens),
        lambda: list(generate(model, [[1, 2], tokens], Sampling())),
    ):
        with pytest.raises(BackendError, match=message):
            call()


@pytest.mark.parametrize(
    "request_",
    [
        ScoreRequest((), (1,)),
        ScoreRequest((1,), ()),
        ScoreRequest((1,), (199,)),
        ScoreRequest((1,) * 200, (1,) * 58),
    ],
)
def test_bad_score_requests_are_refused(request_: ScoreRequest) -> None:
    with pytest.raises(BackendError, match="score request 1"):
        list(ours(SPECS["tied"]).score([ScoreRequest((1,), (2,)), request_]))


def test_score_takes_a_request_that_fills_the_context() -> None:
    ((_, score),) = ours(SPECS["tied"]).score([ScoreRequest((1,) * 200, (2,) * 57)])
    assert score.logprob < 0
