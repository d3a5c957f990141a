"""Load time, prefill and decode speed of one model beside transformers and mlx-lm, in one run.

    python benchmarks/inference.py --model MODEL [--formats fp32,bf16,4bit] [--output FILE.json]

Every implementation runs in a process of its own and stays loaded; repetitions alternate
(A B C D, A B C D, ...), so drift of the machine hits all of them, and ratios are taken repetition
by repetition. Loading is model and tokenizer up to the first token. Decoding is greedy, and the
token ids of every implementation are compared as well. transformers runs with SDPA and its
default cache; ``--compile-transformers`` adds its static cache with torch.compile.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PEERS = {"torch": "transformers", "mlx": "mlx-lm"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "4bit": "bfloat16"}


class Ours:
    def __init__(self, path: str, backend: str, dtype: str) -> None:
        from qwen2kit import ExecutionPlan, Sampling, load_model

        self.loaded = load_model(path, backend=backend, plan=ExecutionPlan(dtype=dtype))
        self.sampling = Sampling

    def stream(self, prompt: list[int], count: int) -> Iterator[int]:
        sampling = self.sampling(max_new_tokens=count)
        for event in self.loaded.generate([prompt], sampling):
            yield event.token


class Transformers:
    def __init__(self, path: str, dtype: str, compiled: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="sdpa", device_map=device
        ).eval()
        self.extra: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}

    def stream(self, prompt: list[int], count: int) -> Iterator[int]:
        stamps: list[int] = []

        class Collect:
            def put(self, value: Any) -> None:
                if value.numel() == 1:
                    stamps.append(int(value))
                    times.append(time.perf_counter())

            def end(self) -> None:
                pass

        times: list[float] = []
        ids = self.torch.tensor([prompt], device=self.model.device)
        with self.torch.inference_mode():
            self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), do_sample=False,
                max_new_tokens=count, min_new_tokens=count, temperature=None, top_k=None,
                top_p=None, repetition_penalty=1.0, streamer=Collect(), **self.extra,
            )  # fmt: skip
        self.times = times
        yield from stamps


class MlxLm:
    def __init__(self, path: str, dtype: str) -> None:
        import mlx.core as mx
        from mlx_lm import load

        self.mx = mx
        self.model, self.tokenizer = load(path)
        del dtype  # the directory's own

    def stream(self, prompt: list[int], count: int) -> Iterator[int]:
        from mlx_lm.generate import generate_step

        for token, _ in generate_step(self.mx.array(prompt), self.model, max_tokens=count):
            yield int(token)


def build(name: str, path: str, dtype: str) -> Any:
    if name in ("torch", "mlx"):
        return Ours(path, name, dtype)
    if name.startswith("transformers"):
        return Transformers(path, dtype, compiled=name.endswith("compiled"))
    return MlxLm(path, dtype)


def timed(model: Any, prompt: list[int], count: int) -> dict[str, Any]:
    start = time.perf_counter()
    stamps, tokens = [], []
    for token in model.stream(prompt, count):
        stamps.append(time.perf_counter())
        tokens.append(token)
    stamps = getattr(model, "times", stamps)
    result: dict[str, Any] = {"prefill_s": stamps[0] - start, "tokens": tokens}
    if count > 1:
        result["decode_tps"] = (len(stamps) - 1) / (stamps[-1] - stamps[0])
    return result


def worker(name: str, path: str, dtype: str) -> None:
    if name in ("torch", "transformers", "transformers-compiled"):
        import torch  # noqa: F401
    if name == "transformers":
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    if name in ("mlx", "mlx-lm"):
        import mlx.core  # noqa: F401
    if name == "mlx-lm":
        import mlx_lm  # noqa: F401
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            start = time.perf_counter()
            model = build(name, path, dtype)
            load = time.perf_counter() - start
            timed(model, [1], 1)
            reply: dict[str, Any] = {"load_s": load, "ready_s": time.perf_counter() - start}
        else:
            reply = timed(model, request["prompt"], request["count"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reply["peak_gb"] = peak / (1 << 20 if sys.platform == "linux" else 1 << 30)
        sys.stdout.write("REPLY " + json.dumps(reply) + "\n")
        sys.stdout.flush()


class Worker:
    def __init__(self, name: str, path: Path, dtype: str) -> None:
        command = [sys.executable, __file__, "--worker", name, str(path), dtype]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("REPLY "):
                return dict(json.loads(line[6:]))
        raise SystemExit(f"{self.name} died")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def prepare(model: str, workdir: Path, form: str) -> dict[str, Path]:
    """Directories each framework family reads for ``form``; converts what is not there yet."""
    dtype = DTYPES[form]
    hf, mlx = workdir / f"hf-{dtype}", workdir / f"mlx-{form}"
    base = [sys.executable, "-m", "qwen2kit", "convert", model]
    if not hf.exists():
        subprocess.run([*base, str(hf), "--to", "hf", "--dtype", dtype], check=True)
    if not mlx.exists():
        bits = ["--bits", "4"] if form == "4bit" else []
        subprocess.run([*base, str(mlx), "--to", "mlx", "--dtype", dtype, *bits], check=True)
    return {"torch": hf, "mlx": mlx}


def measure(
    form: str, folders: dict[str, Path], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    names = ["mlx", "mlx-lm"] if form == "4bit" else ["torch", "transformers", "mlx", "mlx-lm"]
    if options.compile_transformers and form != "4bit":
        names.append("transformers-compiled")
    names = [n for n in names if n in options.only or not options.only]
    prompt = [(7919 * i + 13) % 50_000 for i in range(options.prompt)]
    results: dict[str, dict[str, Any]] = {}
    workers = []
    for name in names:
        family = "torch" if name.startswith(("torch", "transformers")) else "mlx"
        worker_ = Worker(name, folders[family], DTYPES[form])
        cold = worker_.ask(do="load")
        loads = [worker_.ask(do="load") for _ in range(options.loads)]
        results[name] = {"load_first_s": cold["ready_s"], "load_s": [x["ready_s"] for x in loads]}
        worker_.ask(do="run", prompt=prompt, count=4)
        workers.append(worker_)
    for name in names:
        results[name] |= {"prefill_s": [], "decode_tps": [], "tokens": None}
    for _ in range(options.repeats):
        for worker_ in workers:
            reply = worker_.ask(do="run", prompt=prompt, count=options.new)
            record = results[worker_.name]
            record["prefill_s"].append(reply["prefill_s"])
            record["decode_tps"].append(reply["decode_tps"])
            record["tokens"] = reply["tokens"]
            record["peak_gb"] = reply["peak_gb"]
    for worker_ in workers:
        worker_.close()
    for name, peer in PEERS.items():
        if name in results and peer in results:
            results[name]["versus"] = versus(results[name], results[peer])
    return results


def versus(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    def ratio(a: list[float], b: list[float]) -> float:
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    return {
        "load_speedup": ratio(peer["load_s"], ours["load_s"]),
        "prefill_speedup": ratio(peer["prefill_s"], ours["prefill_s"]),
        "decode_speedup": ratio(ours["decode_tps"], peer["decode_tps"]),
        "same_tokens": ours["tokens"] == peer["tokens"],
    }


def show(form: str, prompt: int, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{form}: prompt {prompt} tokens, batch 1")
    print(f"{'':22}{'load s':>9}{'prefill tok/s':>15}{'decode tok/s':>14}{'peak GB':>9}")
    for name, r in results.items():
        prefill = prompt / statistics.median(r["prefill_s"])
        decode, load = statistics.median(r["decode_tps"]), statistics.median(r["load_s"])
        print(f"{name:22}{load:9.2f}{prefill:15.1f}{decode:14.2f}{r['peak_gb']:9.2f}")
        if "versus" in r:
            v = r["versus"]
            print(
                f"  vs {PEERS[name]:17}{v['load_speedup']:8.2f}x{v['prefill_speedup']:14.2f}x"
                f"{v['decode_speedup']:13.2f}x   same tokens: {v['same_tokens']}"
            )


def machine() -> dict[str, Any]:
    packages = ("torch", "transformers", "mlx", "mlx-lm", "qwen2kit", "numpy")
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), **versions}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        worker(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--workdir", type=Path, default=Path("benchmark-models"))
    parser.add_argument("--formats", default="fp32,bf16,4bit")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--only", type=lambda s: s.split(","), default=[])
    parser.add_argument("--compile-transformers", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "command": " ".join(sys.argv), "formats": {}}
    for form in options.formats.split(","):
        folders = prepare(options.model, options.workdir, form)
        report["formats"][form] = measure(form, folders, options)
        show(form, options.prompt, report["formats"][form])
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
