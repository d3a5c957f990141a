"""Decoding on one GPU beside transformers and the device's roof, random weights, in one run.

    python benchmarks/decode.py [--models qwen2-0.5b,qwen2-7b,qwen2-1.5b] [--output FILE.json]

For each model, three processes get ready at the same time and are then measured one after the
other: qwen2kit (torch), transformers (SDPA, default cache), and transformers with its static cache
and torch.compile. Decoding is greedy, one stream after 512 tokens and 64 streams after 128. The
speed of transformers excludes its prefill, as ours does. A process that fails or takes too long
costs its own figures only, and the report is written after every figure. ``--many-compiled`` adds a
process that compiles for 64 streams only, which takes a minute or two a model; give it time with
``--ready``.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

NEW, MANY, SHORT = 128, 64, 128
IMPLEMENTATIONS = ("qwen2kit", "transformers", "transformers-compiled")
COMPILED_FOR_MANY = "transformers-compiled-64"


def context_of(spec: Any) -> int:
    return int(min(512, spec.max_position_embeddings // 2))


class Ours:
    def __init__(self, name: str, device: str, dtype: str) -> None:
        from qwen2kit.backend.plan import ExecutionPlan
        from qwen2kit.backend.registry import get
        from qwen2kit.bench.prompts import random_prompts
        from qwen2kit.bench.random_weights import RandomSource
        from qwen2kit.bench.roof import Held, roof_of
        from qwen2kit.spec.presets import preset

        self.spec, backend = preset(name), get("torch")
        self.context = context_of(self.spec)
        plan = ExecutionPlan(device=device, dtype=dtype)
        self.model = backend.compile(self.spec, plan)
        self.weights = RandomSource(self.spec, dtype)  # type: ignore[arg-type]
        start = time.perf_counter()
        self.model.load(self.weights)
        self.load = time.perf_counter() - start
        self.prompts = random_prompts(self.spec.vocab_size)
        self.meter = backend.meter(plan)  # type: ignore[attr-defined]
        self.roof = lambda: roof_of(
            self.spec, self.weights, Held(dtype),  # type: ignore[arg-type]
            bandwidth=self.meter.copy_bandwidth(), matmul=self.meter.matmul_rate(),
        )  # fmt: skip
        self.one(8)

    def limits(self) -> dict[str, Any]:
        roof = self.roof()
        return {
            "copy_gb_s": roof.bandwidth / 1e9,
            "matmul_tflop_s": roof.matmul / 1e12,
            "weight_gb": roof.weights / 1e9,
            "roof_decode_tps": 1 / roof.decode(self.context + NEW / 2),
            "roof_many_tps": MANY / roof.decode(SHORT + NEW / 2, MANY),
            "load_s": self.load,
        }

    def one(self, new: int = NEW) -> dict[str, Any]:
        from qwen2kit.bench.measure import measure_decode

        found = measure_decode(self.model, self.context, new, self.prompts, 3, None)
        return {"decode_tps": found.tokens_per_second, "peak_gb": self.peak()}

    def many(self) -> dict[str, Any]:
        from qwen2kit.bench.measure import measure_throughput

        found = measure_throughput(self.model, MANY, SHORT, NEW, self.prompts, None)
        return {
            "decode_tps": found.decode_tokens_per_second,
            "whole_tps": found.tokens_per_second,
            "first_token_p99_s": found.first_token[2],
            "between_tokens_ms": [1000 * value for value in found.between_tokens],
            "peak_gb": self.peak(),
        }

    def prefill(self) -> dict[str, Any]:
        from qwen2kit.bench.measure import measure_prefill

        tokens = min(2048, self.model.limit - 1)
        found = measure_prefill(self.model, tokens, self.prompts, 3, None)
        least = self.roof().prefill(tokens)
        return {"prefill_tps": tokens / found.seconds, "roof_share": least / found.seconds}

    def peak(self) -> float:
        return (self.meter.peak_memory() or 0) / 1e9


class Transformers:
    def __init__(
        self, name: str, device: str, dtype: str, *, compiled: bool, streams: int = 1
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from qwen2kit.spec.hf import to_hf_config
        from qwen2kit.spec.presets import preset

        self.torch, self.spec = torch, preset(name)
        self.context = context_of(self.spec)
        with tempfile.TemporaryDirectory() as folder:
            config = json.dumps(to_hf_config(self.spec, dtype=dtype))
            Path(folder, "config.json").write_text(config)
            loaded = AutoConfig.from_pretrained(folder)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(
                loaded, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            ).eval()
        self.extra: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}
        self.compiled = compiled
        for _ in range(2 if compiled else 1):
            self.run(streams, self.context if streams == 1 else SHORT)

    def one(self) -> dict[str, Any]:
        speeds = [self.run(1, self.context)[0] for _ in range(3)]
        return {"decode_tps": statistics.median(speeds), "peak_gb": self.peak()}

    def many(self) -> dict[str, Any]:
        self.run(MANY, SHORT)
        decode, whole = self.run(MANY, SHORT)
        return {"decode_tps": decode, "whole_tps": whole, "peak_gb": self.peak()}

    def run(self, streams: int, context: int) -> tuple[float, float]:
        """Tokens per second of all streams without and with the prefill."""
        times: list[float] = []

        class Stamps:
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        ids = self.torch.randint(
            0, self.spec.vocab_size, (streams, context), device=self.model.device
        )
        start = time.perf_counter()
        with self.torch.inference_mode():
            self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), do_sample=False,
                max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, streamer=Stamps(),
                temperature=None, top_k=None, top_p=None, **self.extra,
            )  # fmt: skip
        end = time.perf_counter()
        first = times[1]  # the prompt itself is put first
        return streams * (NEW - 1) / (end - first), streams * NEW / (end - start)

    def peak(self) -> float:
        cuda = self.torch.cuda
        return cuda.max_memory_allocated() / 1e9 if cuda.is_available() else 0.0


def worker(implementation: str, name: str, device: str, dtype: str) -> None:
    def reply(**document: Any) -> None:
        sys.stdout.write("REPLY " + json.dumps(document) + "\n")
        sys.stdout.flush()

    start = time.perf_counter()
    try:
        if implementation == "qwen2kit":
            model: Any = Ours(name, device, dtype)
        else:
            model = Transformers(
                name, device, dtype, compiled="compiled" in implementation,
                streams=MANY if implementation == COMPILED_FOR_MANY else 1,
            )  # fmt: skip
        reply(ready_s=time.perf_counter() - start)
    except Exception as error:
        reply(error=_short(error))
        return
    for line in sys.stdin:
        try:
            reply(**getattr(model, line.strip())())
        except Exception as error:
            reply(error=_short(error))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Worker:
    def __init__(self, implementation: str, options: argparse.Namespace, name: str) -> None:
        command = [sys.executable, __file__, "--worker", implementation, name]
        self.process = subprocess.Popen(
            [*command, options.device, options.dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )  # fmt: skip
        self.replies: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("REPLY "):
                self.replies.put(json.loads(line[6:]))
        self.replies.put({"error": f"the process ended with code {self.process.wait()}"})

    def ask(self, what: str, seconds: float) -> dict[str, Any]:
        if self.process.poll() is not None:
            return {"error": "the process is gone"}
        assert self.process.stdin
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": "the process is gone"}
        return self.wait(seconds)

    def wait(self, seconds: float) -> dict[str, Any]:
        try:
            return self.replies.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            self.close()
            return {"error": f"no answer within {seconds:.0f} s"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(name: str, options: argparse.Namespace, report: dict[str, Any], end: float) -> None:
    found: dict[str, Any] = {}
    report["models"][name] = found
    entered = (*IMPLEMENTATIONS, *((COMPILED_FOR_MANY,) if options.many_compiled else ()))
    only = [i for i in entered if not options.only or i in options.only]
    workers = {i: Worker(i, options, name) for i in only}
    for implementation, running in workers.items():
        left = min(end - time.monotonic(), options.ready)
        found[implementation] = running.wait(left)
        _note(name, implementation, "ready", found[implementation])
    for what in ("limits", "one", "many", "prefill"):
        for implementation, running in workers.items():
            ours = implementation == "qwen2kit"
            if (what in ("limits", "prefill") and not ours) or "error" in found[implementation]:
                continue
            if what == "many" and (name not in options.many or implementation.endswith("compiled")):
                continue
            if what == "one" and implementation == COMPILED_FOR_MANY:
                continue
            answer = running.ask(what, min(end - time.monotonic(), options.section))
            found[implementation][what] = answer
            _note(name, implementation, what, answer)
            _save(options, report)
    for running in workers.values():
        running.close()


def _note(name: str, implementation: str, what: str, answer: dict[str, Any]) -> None:
    print(f"{time.strftime('%H:%M:%S')} {name} {implementation} {what}: {json.dumps(answer)}")
    sys.stdout.flush()


def _save(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def show(report: dict[str, Any]) -> None:
    print(f"\n{'':37}{'1 stream':>10}{'of roof':>9}{'64 streams':>12}{'of roof':>9}{'GB':>7}")
    for name, found in report["models"].items():
        limits = found.get("qwen2kit", {}).get("limits", {})
        for implementation, entry in found.items():
            one, many = entry.get("one", {}), entry.get("many", {})
            print(
                f"{name:12}{implementation:25}"
                f"{_number(one.get('decode_tps')):>10}"
                f"{_share(one.get('decode_tps'), limits.get('roof_decode_tps')):>9}"
                f"{_number(many.get('decode_tps')):>12}"
                f"{_share(many.get('decode_tps'), limits.get('roof_many_tps')):>9}"
                f"{_number(one.get('peak_gb')):>7}"
            )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _share(value: float | None, roof: float | None) -> str:
    return "-" if value is None or roof is None else f"{value / roof:.0%}"


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        worker(*sys.argv[2:6])
        return

    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=names, default=["qwen2-0.5b", "qwen2-7b", "qwen2-1.5b"])
    parser.add_argument("--many", type=names, default=["qwen2-0.5b", "qwen2-7b"])
    parser.add_argument("--only", type=names, default=[])
    parser.add_argument(
        "--many-compiled", action="store_true", help="transformers compiled for 64 streams too"
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--deadline", type=float, default=285.0, help="seconds in all")
    parser.add_argument("--ready", type=float, default=110.0, help="seconds to get ready")
    parser.add_argument("--section", type=float, default=45.0, help="seconds per figure")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    end = time.monotonic() + options.deadline
    report: dict[str, Any] = {"command": " ".join(sys.argv), "models": {}}
    for name in options.models:
        if time.monotonic() < end - 20:
            measure(name, options, report, end)
            _save(options, report)
    show(report)


if __name__ == "__main__":
    main()
