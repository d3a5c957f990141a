"""Where Triton cannot build what it compiles, PyTorch's operators do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from qwen2kit_torch import lora_nf4, quantized  # noqa: E402
from qwen2kit_torch.triton_support import has_triton  # noqa: E402


class _SaysCuda(torch.Tensor):  # type: ignore[misc]
    """A tensor of the CPU that says it is on CUDA, where no kernel can read it."""

    is_cuda = property(lambda self: True)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory that is all of PATH, and is empty."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_triton_takes_a_c_compiler(
    name: str, no_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_triton()
    with monkeypatch.context() as patched:
        patched.setenv("CC", "cc")
        assert has_triton()
    assert not has_triton()
    (no_compiler / "bin").mkdir()
    (no_compiler / "bin" / name).touch(0o755)
    monkeypatch.setenv("PATH", str(no_compiler / "bin"))
    assert has_triton()


def pretended(tensor: Any) -> Any:
    return tensor.as_subclass(_SaysCuda)


@pytest.mark.usefixtures("no_compiler")
def test_packed_weights_are_expanded_without_one() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    packed, absmax = lora_nf4.quantize(weight)
    expected = lora_nf4.dequantize(packed, absmax, (8, 64), torch.float32)
    found = lora_nf4.dequantize(pretended(packed), absmax, (8, 64), torch.float32)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)

    codes = torch.arange(8 * 8, dtype=torch.int32).view(8, 8) * 0x01010101
    steps = torch.rand(8, 2, 2, generator=torch.Generator().manual_seed(0))
    plain = quantized.Quantized(codes, steps, 4, 32)
    on_cuda = quantized.Quantized(pretended(codes), steps, 4, 32)
    found = on_cuda.dense(torch.float32).as_subclass(torch.Tensor)
    assert torch.equal(found, plain.dense(torch.float32))
