"""vLLM's decoding speed with random weights, measured as benchmarks/decode.py measures the others.

    PYTHONPATH=<where vllm is> python benchmarks/decode_vllm.py [--models qwen2-0.5b,qwen2-7b] \
        [--output FILE.json]

One stream after 512 tokens and 64 streams after 128, greedy, 128 new tokens each, CUDA graphs and
vLLM's own compilation on, no prefix cache. The time of the same request for one token is taken off,
so that prefill does not count. Each model runs in a process of its own.

By default vLLM's engine shares the process of the caller; what the environment says goes first, so
that ``VLLM_ENABLE_V1_MULTIPROCESSING=1`` measures the engine in a process of its own. The mode and
the other settings stand in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contest import announce, append, environment, run_alone, so_far

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
NEW, REPEATS = 128, 3
CASES = {"one": (1, 512), "many": (64, 128)}
MODE = "VLLM_ENABLE_V1_MULTIPROCESSING"
SETTINGS = {
    MODE: "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
}


def decode(name: str) -> dict[str, Any]:
    """Tokens per second of every case."""
    from qwen2kit.spec.hf import to_hf_config
    from qwen2kit.spec.presets import preset

    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    import vllm
    from vllm import LLM, SamplingParams

    spec = preset(name)
    with tempfile.TemporaryDirectory() as folder:
        config = to_hf_config(spec, dtype="bfloat16")
        Path(folder, "config.json").write_text(json.dumps(config))
        model = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=1024,
            max_num_seqs=64,
            gpu_memory_utilization=0.85,
            enable_prefix_caching=False,
        )

    def seconds(streams: int, context: int, new: int) -> float:
        prompts = [
            {"prompt_token_ids": [(7919 * i + 31 * row + 13) % 50_000 for i in range(context)]}
            for row in range(streams)
        ]
        wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        answers = model.generate(prompts, wanted, use_tqdm=False)
        assert sum(len(answer.outputs[0].token_ids) for answer in answers) == streams * new
        return time.perf_counter() - start

    found: dict[str, Any] = {
        "vllm": vllm.__version__,
        "engine_process": "own" if os.environ[MODE] == "1" else "the caller's",
        "settings": {key: os.environ[key] for key in SETTINGS},
    }
    for case, (streams, context) in CASES.items():
        seconds(streams, context, 8)
        whole = statistics.median(seconds(streams, context, NEW + 1) for _ in range(REPEATS))
        first = statistics.median(seconds(streams, context, 1) for _ in range(REPEATS))
        found[case] = {
            "streams": streams,
            "context": context,
            "decode_tps": round(streams * NEW / (whole - first), 1),
            "first_s": round(first, 4),
        }
        so_far(found)
    return found


def main() -> None:
    """Every model, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="qwen2-0.5b,qwen2-7b")
    parser.add_argument("--limit", type=float, default=240, help="seconds for a model")
    parser.add_argument("--output", type=Path, help="results are appended to it")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        announce(decode(arguments.only) | {"environment": environment()})
        return
    for name in arguments.models.split(","):
        found = {"model": name} | run_alone(["--only", name], arguments.limit)
        print(found, flush=True)
        append(arguments.output, found)


if __name__ == "__main__":
    main()
