"""FlashAttention 4 takes our calls: its kernels compile for Hopper and Blackwell without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

pytest.importorskip("torch")

_PROGRAM = """
import json
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from qwen2kit_torch.fused import flash

torch.cuda.current_device = lambda: 0
# What the operators run on a device, not what they tell compilers.
forward, backward = flash._forward._init_fn, flash._backward._init_fn
count = 0

def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device="cuda", dtype=dtype)

def run(shape, kv_shape, *segments, window=None, exact=False):
    q, k, v = tensor(*shape), tensor(*kv_shape), tensor(*kv_shape)
    rest = *(segments or (None, None, None)), window
    out, lse = forward(q, k, v, *rest)
    told, statistics = flash._forward(q, k, v, *rest)
    assert out.shape == told.shape and out.stride() == told.stride()
    assert lse.shape == statistics.shape and lse.stride() == statistics.stride()
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.use_deterministic_algorithms(exact)
    found = backward(out, q, k, v, out, lse, *rest)
    assert [x.shape for x in found] == [x.shape for x in (q, k, v)]
    global count
    count += 1

with FakeTensorMode():
    run((2, 1024, 14, 64), (2, 1024, 2, 64))
    run((2, 1024, 12, 128), (2, 1024, 2, 128), exact=True)
    run((2, 1024, 4, 96), (2, 1024, 4, 96), window=100)
    for segments in (64, 512):
        starts = tensor(segments + 1, dtype=torch.int32)
        run((2048, 14, 64), (4096, 2, 64), starts, starts.clone(), 2048, window=7, exact=True)
print(json.dumps(count))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_kernels_compile(arch: str) -> None:
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        pytest.skip("needs flash-attn-4: pip install 'qwen2kit[hopper]'")
    target = {
        "FLASH_ATTENTION_ARCH": arch.removesuffix("a"),
        "CUTE_DSL_ARCH": arch,
        "FLASH_ATTENTION_NUM_SMS": "132",
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        capture_output=True,
        text=True,
        env=os.environ | target,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == 5
