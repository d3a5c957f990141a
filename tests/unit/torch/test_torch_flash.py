"""FlashAttention 4: when it is chosen, and its operators around a double of its kernels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen2kit.errors import BackendError

torch = pytest.importorskip("torch")

HEADS, KV_HEADS, WIDTH = 4, 2, 8


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The double in the place of the package."""
    from qwen2kit_torch.fused import flash
    from tests.unit.torch import flash_double

    monkeypatch.setattr(flash, "interface", lambda: flash_double)
    return flash_double


def heads(*shape: int) -> list[Any]:
    """Random queries, keys and values ``[*shape, heads, C]`` in float32."""
    counts = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(*shape, count, WIDTH, requires_grad=True) for count in counts]


def expected(q: Any, k: Any, v: Any, window: int | None) -> Any:
    """torch's attention of ``[B, T, heads, C]`` under a mask aligned at the end, in float64."""
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    distance = distance - torch.arange(k.shape[1])
    mask = (distance >= 0) & (distance < (window or k.shape[1]))
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return out.transpose(1, 2)


def assert_same(found: Any, theirs: Any, inputs: list[Any]) -> None:
    """Equal values, and equal gradients of ``inputs``."""
    torch.testing.assert_close(found.double(), theirs, rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(found)
    ours = torch.autograd.grad(found, inputs, slope)
    reference = torch.autograd.grad(theirs, inputs, slope.double())
    for gradient, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_whole_rows_are_torchs_attention(double: Any, window: int | None, compiled: bool) -> None:
    from qwen2kit_torch.train.flash import FlashAttend

    torch.manual_seed(0)
    inputs = heads(2, 9)
    attend: Any = FlashAttend(window)
    if compiled:
        torch._dynamo.reset()
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = attend(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)
    assert found.is_contiguous()
    assert_same(found, expected(*inputs, window), inputs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("keys", [11, 17])
def test_segments_are_torchs_attention(double: Any, window: int | None, keys: int) -> None:
    """Two segments, the second with more keys than queries, and empty ones behind."""
    from qwen2kit_torch.fused.flash import flash_attention

    torch.manual_seed(0)
    (q, _, _), (_, k, v) = heads(11), heads(keys)
    lengths = [[4, 7, 0, 0], [4, keys - 4, 0, 0]]
    starts = tuple(torch.tensor(np.cumsum([0, *each]), dtype=torch.int32) for each in lengths)
    found = flash_attention(q, k, v, starts=starts, longest=keys, window=window)
    parts = [
        expected(*(x[None] for x in (q[queries], k[others], v[others])), window)[0]
        for queries, others in ((slice(4), slice(4)), (slice(4, None), slice(4, None)))
    ]
    assert_same(found, torch.cat(parts), [q, k, v])


@pytest.mark.parametrize("packed", [False, True])
def test_operators_are_what_compilers_are_told(double: Any, packed: bool) -> None:
    from qwen2kit_torch.fused import flash

    torch.manual_seed(0)
    q, k, v = heads(9) if packed else heads(2, 9)
    starts = torch.tensor([0, 4, 9, 9], dtype=torch.int32) if packed else None
    rest = (starts, starts, 5 if packed else None, 4)
    torch.library.opcheck(flash._forward, (q, k, v, *rest))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = flash._forward(q, k, v, *rest)
    torch.library.opcheck(flash._backward, (out, q, k, v, out, lse, *rest))


def test_the_backward_pass_is_deterministic_where_torch_is_told_so(
    double: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen2kit_torch.fused.flash import flash_attention

    told = []
    backward = double._flash_attn_bwd

    def spy(*args: Any, **options: Any) -> Any:
        told.append(options["deterministic"])
        return backward(*args, **options)

    monkeypatch.setattr(double, "_flash_attn_bwd", spy)
    for exact in (False, True):
        torch.use_deterministic_algorithms(exact)
        try:
            flash_attention(*heads(1, 3)).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert told == [False, True]


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("kind", ["whole", "packed", "packed and padded"])
def test_micro_batches_attend_as_masks_do(double: Any, kind: str, cp: int) -> None:
    """Full attention and sliding windows, of every process of a context-parallel group."""
    from qwen2kit_torch.parallel.context import GatheredAttend, gathered_positions, positions_of
    from qwen2kit_torch.train.batch import Cutting

    rng = np.random.default_rng(0)
    shape = rows, length = 2, 16
    documents = np.zeros(shape, np.int32)
    if kind != "whole":
        documents = np.sort(rng.integers(0, 4, shape), axis=1).astype(np.int32)
    if kind == "packed and padded":
        documents[1, 11:] = -1
    torch.manual_seed(0)
    counts = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(rows, count, length, WIDTH) for count in counts)
    masks = Cutting(rows=rows, device=torch.device("cpu"), windows=(None, 5))
    whole = {w: visible(q, k, v) for w, visible in masks._visible(documents, False).items()}
    for rank in range(cp):
        group: Any = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: cp)
        cut = replace(masks, varlen=True, flash=True, cp=None if cp == 1 else group)
        here, order = positions_of(rank, cp, length), gathered_positions(cp, length)
        for window, attend in cut._visible(documents, kind == "whole").items():
            inner = attend.inner if isinstance(attend, GatheredAttend) else attend
            out = inner(q[:, :, here], k[:, :, order], v[:, :, order])
            torch.testing.assert_close(out, whole[window][:, :, here], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_layer_with_it_computes_what_one_without_does(
    double: Any, recompute: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads fused; selective recomputation keeps the result instead of attending again."""
    from qwen2kit_torch.attention import Visibility
    from qwen2kit_torch.model import DecoderLayer
    from qwen2kit_torch.parallel.compilation import compile_layer
    from qwen2kit_torch.parallel.recompute import recompute as apply
    from qwen2kit_torch.rope import Rotary
    from qwen2kit_torch.train.flash import FlashAttend
    from tests.conftest import small_spec

    spec = small_spec()
    torch.manual_seed(0)
    layer = DecoderLayer(spec, 0, torch.device("cpu"), torch.float32)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.fused = layer.self_attn.fused = layer.mlp.fused = True
    cos, sin = Rotary(spec).tables(9, torch.device("cpu"), torch.float32)
    rope = (cos[:9, None], sin[:9, None])
    x = torch.randn(2, 9, spec.hidden_size)
    plain = layer.forward
    forward, calls = double._flash_attn_fwd, []
    monkeypatch.setattr(
        double, "_flash_attn_fwd", lambda *a, **k: (calls.append(0), forward(*a, **k))[1]
    )
    found = []
    for attend in (Visibility(None, causal=True), FlashAttend(None)):
        layer.forward = plain
        torch._dynamo.reset()
        apply(layer, recompute)
        if compiled:
            compile_layer(layer)
        layer.zero_grad()
        out = layer(x, rope, {None: attend}, None)
        out.square().sum().backward()
        found.append([out, *(p.grad.clone() for p in layer.parameters())])
    assert len(calls) == 1
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_recipes_say_whose_attention() -> None:
    from qwen2kit.config.load import load_recipe
    from qwen2kit.train.setup import execution_plan

    for attention in ("auto", "sdpa", "flash-attn-4"):
        plan = execution_plan(load_recipe("tiny", [f"train.attention={attention}"])).train
        assert plan is not None
        assert plan.attention == attention


class TestChoice:
    """Of the kernels, by wish, device, dtype, heads and what is installed."""

    @pytest.fixture
    def hopper(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A GPU of capability 9.0 with the package; its attributes may be changed."""
        from qwen2kit_torch.train import flash

        machine = SimpleNamespace(capability=(9, 0), version=lambda name: "4.0.0b36")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine.capability)
        monkeypatch.setattr(flash, "version", lambda name: machine.version(name))
        monkeypatch.setattr(flash, "interface", lambda: machine.interface())
        machine.interface = SimpleNamespace
        return machine

    @staticmethod
    def takes(wish: Any = "auto", dtype: str = "bfloat16", width: int = 64) -> bool:
        from qwen2kit_torch.train.flash import takes_flash

        return takes_flash(wish, torch.device("cuda"), getattr(torch, dtype), width)

    @pytest.mark.parametrize("width", [64, 96, 128])
    def test_it_is_taken_where_it_fits(self, hopper: Any, width: int) -> None:
        assert self.takes(width=width)
        assert self.takes("flash-attn-4", width=width)
        assert not self.takes("sdpa", width=width)

    @pytest.mark.parametrize(
        ("change", "options", "message"),
        [
            ({"capability": (8, 6)}, {}, "capability 9 or 10 and this one has 8.6"),
            ({"capability": (12, 0)}, {}, "capability 9 or 10"),
            ({}, {"dtype": "float32"}, "does not compute in float32"),
            ({}, {"width": 256}, "does not fit head_dim=256"),
        ],
    )
    def test_where_it_does_not_fit_only_a_wish_is_an_error(
        self, hopper: Any, change: dict[str, Any], options: dict[str, Any], message: str
    ) -> None:
        vars(hopper).update(change)
        assert not self.takes(**options)
        with pytest.raises(BackendError, match=message):
            self.takes("flash-attn-4", **options)

    def test_without_the_package_a_wish_names_the_extra(self, hopper: Any) -> None:
        from importlib.metadata import PackageNotFoundError

        def absent(name: str) -> str:
            raise PackageNotFoundError(name)

        hopper.version = absent
        assert not self.takes()
        with pytest.raises(BackendError, match=r"pip install 'qwen2kit\[hopper\]'"):
            self.takes("flash-attn-4")

    def test_a_package_that_does_not_load_is_said(self, hopper: Any) -> None:
        def broken() -> None:
            raise ImportError("no cutlass")

        hopper.interface = broken
        with pytest.raises(BackendError, match="no cutlass"):
            self.takes()
        assert not self.takes("sdpa")

    def test_a_cpu_never_takes_it(self) -> None:
        from qwen2kit_torch.train.flash import takes_flash

        cpu = torch.device("cpu")
        assert not takes_flash("auto", cpu, torch.bfloat16, 64)
        with pytest.raises(BackendError, match="needs an NVIDIA GPU and this is cpu"):
            takes_flash("flash-attn-4", cpu, torch.bfloat16, 64)
