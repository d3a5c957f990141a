"""Products with a chosen algorithm: what they compute, how the choice is made and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")

from qwen2kit_torch.fused import products  # noqa: E402
from qwen2kit_torch.fused.algorithms import Remembered, quickest  # noqa: E402
from qwen2kit_torch.fused.cublaslt import CublasLtError, Problem  # noqa: E402
from qwen2kit_torch.fused.products import linear_onto, multiply  # noqa: E402

PROBLEM = Problem(64, 32, 16, False, True, torch.bfloat16, torch.bfloat16, False, False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("onto", [False, True])
def test_it_is_a_linear_layer_and_so_is_its_gradient(bias: bool, onto: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return made.requires_grad_()

    x, weight = made(2, 3, 5), made(4, 5)
    added, base = made(4) if bias else None, made(2, 3, 4) if onto else None
    found = linear_onto(x, weight, added, base)
    expected = torch.nn.functional.linear(x, weight, added)
    expected = expected if base is None else expected + base
    torch.testing.assert_close(found, expected)
    given = [t for t in (x, weight, added, base) if t is not None]
    slope = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, given, slope)
    torch.testing.assert_close(torch.autograd.grad(found, given, slope), wanted)


def test_a_frozen_operand_gets_no_gradient() -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    linear_onto(x, weight, None, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 5))
    assert weight.grad is None


@pytest.mark.parametrize("turn_a", [False, True])
@pytest.mark.parametrize("turn_b", [False, True])
def test_operands_may_be_stored_transposed(turn_a: bool, turn_b: bool) -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 4)
    found = multiply(
        a.t().contiguous() if turn_a else a,
        b.t().contiguous() if turn_b else b,
        turn_a=turn_a,
        turn_b=turn_b,
    )
    torch.testing.assert_close(found, a @ b)


def test_the_operators_keep_torchs_rules() -> None:
    x, weight, onto = (torch.randn(*s, requires_grad=True) for s in ((3, 5), (4, 5), (3, 4)))
    torch.library.opcheck(torch.ops.qwen2kit.linear, (x, weight, None, onto))
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    torch.library.opcheck(torch.ops.qwen2kit.multiply, (a, b, False, True))


def test_the_default_stays_unless_another_is_clearly_quicker() -> None:
    assert quickest({b"": 1.0, b"a": 0.995, b"b": 1.2}) == b""
    assert quickest({b"": 1.0, b"a": 0.9, b"b": 0.95}) == b"a"


def test_choices_outlive_the_process_and_the_first_one_holds(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "choices.json"
    first, second = Remembered(path), Remembered(path)
    assert first.get(PROBLEM) is None
    assert first.settle(PROBLEM, b"\x01\x02") == b"\x01\x02"
    # Another process that measured something else meanwhile.
    assert second.settle(PROBLEM, b"\x03") == b"\x01\x02"
    other = replace(PROBLEM, bias=True)
    assert second.settle(other, b"") == b""
    again = Remembered(path)
    assert again.get(PROBLEM) == b"\x01\x02"
    assert again.get(other) == b""


@pytest.mark.parametrize("content", ["", "[]", '{"a": 3}', '{"a": "xyz"}'])
def test_a_damaged_file_is_done_without(tmp_path: Path, content: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(content)
    assert Remembered(path).get(PROBLEM) is None
    assert Remembered(path).settle(PROBLEM, b"\x05") == b"\x05"
    assert list(json.loads(path.read_text()).values()) == ["05"]


def test_choices_are_kept_in_memory_where_there_is_no_room_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = Remembered(tmp_path / "file" / "choices.json")
    assert known.settle(PROBLEM, b"\x07") == b"\x07"
    assert known.get(PROBLEM) == b"\x07"


class Multiplier:
    """A `Product` on a CPU: ``good`` computes, ``bad`` is refused."""

    ran: ClassVar[list[bytes]] = []

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def proposals(self, bias: torch.Tensor | None) -> list[bytes]:
        assert (bias is not None) == self.problem.bias
        return [b"bad", b"good"]

    def run(
        self,
        algorithm: bytes,
        a: torch.Tensor,
        b: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        onto: torch.Tensor | None,
    ) -> None:
        if algorithm == b"bad":
            raise CublasLtError("refused")
        self.ran.append(algorithm)
        a, b = a.t() if self.problem.turn_a else a, b.t() if self.problem.turn_b else b
        found = a.to(out.dtype) @ b.to(out.dtype)
        for more in (bias, onto):
            found = found if more is None else found + more
        assert found.shape == (self.problem.rows, self.problem.columns)
        out.copy_(found)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[set[bytes]]:
    """Products are tuned on this CPU, by `Multiplier`; the keys of every race."""
    races: list[set[bytes]] = []

    def fastest(ways: Mapping[bytes, Callable[[], None]]) -> bytes:
        races.append(set(ways))
        for launch in ways.values():
            launch()
        return b"good"

    known = Remembered(tmp_path / "choices.json")
    monkeypatch.setattr(products._Operands, "tunable", True)
    monkeypatch.setattr(products, "Product", Multiplier)
    monkeypatch.setattr(products, "fastest", fastest)
    monkeypatch.setattr(products, "_ways", {})
    monkeypatch.setattr(products, "_remembered", lambda device: known)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Multiplier, "ran", [])
    return races


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("onto", [False, True])
def test_an_algorithm_is_chosen_at_the_third_product_and_kept(
    tuned: list[set[bytes]], monkeypatch: pytest.MonkeyPatch, bias: bool, onto: bool
) -> None:
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    added, base = torch.randn(4) if bias else None, torch.randn(3, 4) if onto else None
    expected = torch.nn.functional.linear(x, weight, added)
    expected = expected if base is None else expected + base
    # PyTorch copies what a product is added to, and then does not take part.
    race = {b"good"} if onto else {b"good", b""}
    for launches in (0, 0, 3, 4):
        torch.testing.assert_close(linear_onto(x, weight, added, base), expected)
        assert len(Multiplier.ran) == launches
    assert tuned == [race]
    monkeypatch.setattr(products, "_ways", {})
    Multiplier.ran.clear()
    torch.testing.assert_close(linear_onto(x, weight, added, base), expected)
    assert Multiplier.ran == [b"good", b"good"], "tried elsewhere, then used"
    assert tuned == [race]


def test_choosing_leaves_a_running_sum_alone(tuned: list[set[bytes]]) -> None:
    a, b, total = torch.randn(3, 4), torch.randn(3, 5), torch.ones(4, 5)
    expected = torch.ones(4, 5)
    for _ in range(5):
        products.accumulate_(total, a, b)
        expected += a.t() @ b
        torch.testing.assert_close(total, expected)
    assert tuned == [{b"good", b""}]
    assert Multiplier.ran


def test_a_problem_that_the_library_refuses_is_pytorchs(
    tuned: list[set[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(problem: Problem) -> None:
        raise CublasLtError("refused")

    monkeypatch.setattr(products, "Product", refuses)
    a, b = torch.randn(3, 5), torch.randn(5, 4)
    for _ in range(4):
        torch.testing.assert_close(multiply(a, b), a @ b)
    assert not tuned


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    """cuBLASLt itself."""

    @pytest.mark.parametrize("turn_a", [False, True])
    @pytest.mark.parametrize("turn_b", [False, True])
    @pytest.mark.parametrize("added", ["", "bias", "onto"])
    @pytest.mark.parametrize("wide", [False, True])
    def test_every_proposal_computes_the_product(
        self, turn_a: bool, turn_b: bool, added: str, wide: bool
    ) -> None:
        from qwen2kit_torch.fused.cublaslt import Product

        if wide and added == "bias":
            pytest.skip("never asked for")
        torch.manual_seed(0)
        rows, columns, inner = 384, 256, 640
        kind = torch.float32 if wide else torch.bfloat16
        a = torch.randn(rows, inner, device="cuda").bfloat16()
        b = torch.randn(inner, columns, device="cuda").bfloat16()
        bias = torch.randn(columns, device="cuda").bfloat16() if added == "bias" else None
        onto = torch.randn(rows, columns, device="cuda").to(kind) if added == "onto" else None
        expected = a.double() @ b.double()
        for more in (bias, onto):
            expected = expected if more is None else expected + more.double()
        problem = Problem(
            *(rows, columns, inner, turn_a, turn_b, torch.bfloat16, kind),
            *(bias is not None, onto is not None),
        )
        product = Product(problem)
        a = a.t().contiguous() if turn_a else a
        b = b.t().contiguous() if turn_b else b
        proposals = product.proposals(bias)
        assert proposals
        for algorithm in proposals:
            out = torch.empty(rows, columns, device="cuda", dtype=kind)
            product.run(algorithm, a, b, out, bias, onto)
            tolerance = 1e-4 if wide else 1e-2
            torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=0.05)

    def test_a_tuned_layer_is_the_layer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(products, "_WORTHWHILE", 1)
        monkeypatch.setattr(products, "_ways", {})
        monkeypatch.setattr(products, "_remembered", lambda device: known)
        known = Remembered(tmp_path / "choices.json")
        torch.manual_seed(0)
        x = torch.randn(512, 768, device="cuda").bfloat16().requires_grad_()
        weight = (torch.randn(1024, 768, device="cuda") * 0.02).requires_grad_()
        onto = torch.randn(512, 1024, device="cuda").bfloat16().requires_grad_()
        slope = torch.randn(512, 1024, device="cuda").bfloat16()
        wide = [t.detach().double().requires_grad_() for t in (x, weight, onto)]
        expected = wide[0] @ wide[1].t() + wide[2]
        wanted = torch.autograd.grad(expected, wide, slope.double())
        layer = torch.compile(lambda: linear_onto(x, weight, None, onto), fullgraph=True)
        for _ in range(5):
            found = layer()
            gradients = torch.autograd.grad(found, (x, weight, onto), slope)
            torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
            for gradient, want in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(gradient.double(), want, rtol=2e-2, atol=0.2)
        assert len(json.loads(known.path.read_text())) == 3

    def test_accumulation_adds_up_in_float32(self) -> None:
        torch.manual_seed(0)
        a = torch.randn(1024, 2048, device="cuda").bfloat16()
        b = torch.randn(1024, 1536, device="cuda").bfloat16()
        total = torch.ones(2048, 1536, device="cuda")
        for _ in range(4):
            products.accumulate_(total, a, b)
        expected = 1 + 4 * (a.double().t() @ b.double())
        torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-2)
