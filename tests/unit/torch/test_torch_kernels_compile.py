"""Every kernel of the decoding step compiles for compute capability 9.0, which needs no GPU.

The interpreter accepts more than the compiler does, and tells nothing of shared memory or of
registers that do not suffice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

_PROGRAM = """
import json
import re
import subprocess
import tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qwen2kit_torch.engine.kernels import attention, draws, packed, products, prompt, rows
from qwen2kit_torch.engine.tuning import rows_tile

HIDDEN, HEADS, KV_HEADS, SIZE, FFN, VOCAB = 896, 14, 2, 64, 4864, 151936
KINDS = dict(
    slots="*i32", positions="*i32", tokens="*i32", history="*i32", step="*i32", limit="*i32",
    tiles="*i32", arrived="*i32", best_ids="*i32", parts="*fp32", weights="*fp32", best="*fp32",
    capacity="i32", count="i32", eps="fp32", scale="fp32", codes="*i32",
)
DRAWS = dict(
    limits="*i32", temperatures="*fp64", top_k="*i32", top_p="*fp64", points="*fp64",
    peaks="*fp32", weights="*fp64", counts="*i32", keys="*i32", ids="*i32", drawn="*i32",
    parts="i32", width="i32", said="*i16", rules="*fp64",
)

def stack(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(found) for found in re.findall("STACK:([0-9]+)", told))

def compile(kernel, warps=4, early=False, kinds={}, **constants):
    names = kernel.arg_names
    if early:
        constants["PDL"] = True
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, KINDS.get(name, "*bf16"))
        for name in names
    }
    whole = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name == "capacity"
    }
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=whole)
    options = {"num_warps": warps} | ({"launch_pdl": True} if early else {})
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = found.asm["ptx"]
    return {
        "wide loads": ptx.count("v4.b32"),
        "waits": ptx.count("griddepcontrol.wait"),
        "tensor cores": "mma" in ptx,
        "shared": found.metadata.shared,
        "stack": stack(found.asm["cubin"]),
        "moves": ptx.count("st.shared.v"),
    }

heads = dict(HEADS=HEADS, KV_HEADS=KV_HEADS, SIZE=SIZE)
turned = heads | dict(ANCHORED=False)
split = heads | dict(WINDOW=0, SPLITS=16, SPREAD=2, BLOCK=64, GROUP=16)
report = {}
for bits, group, block, warps in ((0, 1, 1024, 2), (4, 64, 512, 2), (8, 64, 1024, 4)):
    form = dict(ROWS=4, BLOCK=block, BITS=bits, GROUP=group)
    kinds = {"weight": "*i32" if bits else "*bf16"}
    for kernel, more in (
        (products.project_heads, turned | {"WIDTH": HIDDEN}),
        (products.add_product, dict(HEIGHT=HIDDEN, WIDTH=FFN)),
        (products.gate_up, dict(HEIGHT=FFN, WIDTH=HIDDEN)),
    ):
        name = f"{kernel.__name__} {bits}"
        report[name] = compile(kernel, warps, True, kinds, **form, **more)
report["head"] = compile(
    products.head, 2, True, HEIGHT=VOCAB, WIDTH=HIDDEN, REPEAT=8, ROWS=4, BLOCK=1024
)
report["attend"] = compile(attention.attend, 4, True, **split)
report["attend_tiles"] = compile(
    prompt.attend_tiles, 8, **heads, WINDOW=0, ROWS=128, BLOCK=64
)
report["choose"] = compile(rows.choose, 16, True, ROWS=1, BLOCKS=4748, BLOCK=8192, STEPS=32)
report["embed"] = compile(rows.embed, WIDTH=HIDDEN, BLOCK=1024, kinds={"step": "*i32"})
report["add_and_norm"] = compile(rows.add_and_norm, ADDS=True, WIDTH=HIDDEN, BLOCK=1024)
report["rotate_and_store"] = compile(rows.rotate_and_store, 1, **turned)
for kernel, more in (
    (rows.rotate_and_store, {}),
    (products.project_heads, dict(WIDTH=HIDDEN, ROWS=4, BLOCK=1024, BITS=0, GROUP=1)),
):
    wide = dict.fromkeys(set(kernel.arg_names) - set(KINDS), "*fp32")
    report[f"anchored {kernel.__name__}"] = compile(
        kernel, 1, "PDL" in kernel.arg_names, wide, **heads, **more, ANCHORED=True
    )
report["silu_times"] = compile(rows.silu_times, HEIGHT=FFN, BLOCK=1024)
report["best_of_blocks"] = compile(
    rows.best_of_blocks, HEIGHT=VOCAB, BLOCKS=75, BLOCK=2048
)
for bits in (4, 8):
    for rows_, splits in ((16, 1), (64, 1), (16, 2)):
        tile = rows_tile(FFN, HIDDEN, rows_, bits, 2)
        report[f"packed_rows {bits}, {rows_} rows, {splits} ranges"] = compile(
            packed.packed_rows, tile.warps, HEIGHT=FFN, WIDTH=HIDDEN, BIASED=False,
            ROWS=tile.rows, BLOCK=tile.block, SPAN=tile.span, SPLITS=splits, STAGES=tile.stages,
            BITS=bits, GROUP=64,
        )
    tile = rows_tile(37888, 3584, 32, bits, 2)
    report[f"packed_rows {bits} of a larger model"] = compile(
        packed.packed_rows, tile.warps, HEIGHT=37888, WIDTH=3584, BIASED=False,
        ROWS=tile.rows, BLOCK=tile.block, SPAN=tile.span, SPLITS=tile.splits, STAGES=tile.stages,
        BITS=bits, GROUP=64,
    )
    report[f"expand {bits}"] = compile(packed.expand, WIDTH=HIDDEN, BLOCK=1024, BITS=bits, GROUP=64)
for kind in ("*bf16", "*fp32"):
    size = dict(HEIGHT=VOCAB, BLOCK=2048, PENALISED=kind == "*bf16")
    counted = size | dict(COUNTS=True)
    kinds = DRAWS | {"logits": kind}
    report[f"find_peaks {kind}"] = compile(draws.find_peaks, kinds=kinds, **size)
    report[f"weigh {kind}"] = compile(draws.weigh, kinds=kinds, **counted)
    counted |= dict(BLOCK=1024, SCAN=2048 if kind == "*bf16" else 4096, STEPS=32)
    report[f"draw {kind}"] = compile(draws.draw, 8, kinds=kinds, **counted)
report["advance"] = compile(draws.advance, kinds=DRAWS, ROWS=8, STEPS=32, HEIGHT=VOCAB)
print(json.dumps(report))
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper_with_wide_loads() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for name, found in report.items():
        product = name.startswith(("project", "add_product", "gate_up", "head"))
        if product or name == "attend":
            assert found["waits"] >= 1, name
            assert found["wide loads"] >= 2, name
        if name.startswith(("attend", "packed_rows")):
            assert found["tensor cores"], name
        if name.endswith(" 1 ranges"):
            assert found["moves"] == 0, name  # codes become operands in their lanes
        assert found["shared"] <= 227 << 10, name
        assert found["stack"] <= 16, name  # no registers are spilled to speak of
