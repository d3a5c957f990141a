"""Size, perplexity and KL divergence of a model quantised to 8, 6, 4, 3 and 2 bits.

Every conversion goes through `qwen2kit.weights.convert` into a temporary folder and is measured
against the original's logits, which are computed once. Writes one JSON document.

    python benchmarks/quantization.py --model model.gguf --out quantization.json
    python benchmarks/quantization.py --model model.gguf --out quantization.json --speed torch,mlx

With ``--speed``, `qwen2kit bench` decodes 16 tokens after 32 on every backend named.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qwen2kit.parity.passages import AUTO, held_out
from qwen2kit.parity.quality import Yardstick
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit.weights.convert import convert
from qwen2kit.weights.locate import locate


def main() -> None:
    """Measure, print a line per model, write the document after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", default="8,6,4,3,2")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", help="of scales, biases and norms")
    parser.add_argument("--text", default=AUTO, help="a UTF-8 file; auto: the built-in passages")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--speed", default="", help="backends to time, e.g. torch,mlx")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    source = open_checkpoint(locate(options.model))
    windows = held_out(source.tokenizer(), options.text, context=source.spec.context_length)
    with TemporaryDirectory(prefix="quantization-") as folder:
        yardstick = Yardstick(source, windows, Path(folder), backend=options.backend)
        document: dict[str, Any] = {
            "model": source.path.name,
            "text": options.text,
            "tokens": sum(len(window.tokens) for window in windows),
            "group_size": options.group_size,
            "backend": yardstick.backend,
            "dtype": yardstick.dtype,
            "scales": options.dtype,
            "versions": {name: version(name) for name in ("qwen2kit", "numpy", yardstick.backend)},
            "python": platform.python_version(),
            "original": {
                **asdict(yardstick.original),
                "tokens_per_second": speeds(options.speed, str(locate(options.model)), None),
            },
            "quantised": [],
        }
        for bits in (int(value) for value in options.bits.split(",")):
            started = time.perf_counter()
            out = Path(folder) / f"{bits}-bit"
            convert(
                source, out, to="mlx", dtype=options.dtype, quantize_bits=bits,
                group_size=options.group_size,
            )  # fmt: skip
            row = {"bits": bits, **asdict(yardstick.measure(open_checkpoint(out)))}
            row["tokens_per_second"] = speeds(options.speed, str(out), bits)
            shutil.rmtree(out)
            document["quantised"].append(row)
            options.out.write_text(json.dumps(document, indent=2) + "\n")
            sys.stderr.write(f"{time.perf_counter() - started:.0f} s: {json.dumps(row)}\n")


def speeds(backends: str, model: str, bits: int | None) -> dict[str, float]:
    """Decoded tokens per second by backend; torch keeps 8 and 4 bits packed, and expands others."""
    found = {}
    for backend in filter(None, backends.split(",")):
        command = [sys.executable, "-m", "qwen2kit", "bench", model, "--backend", backend, "--json"]
        command += ["--prefill", "", "--streams", "", "--contexts", "32", "--new", "16"]
        if backend == "torch" and bits in (4, 8):
            command += ["--weight-bits", str(bits)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[backend] = round(json.loads(said)["decode"][0]["tokens_per_second"], 2)
    return found


if __name__ == "__main__":
    main()
