"""Recorded benchmark requests through our engine and through lm-eval's own ``hf`` model.

    python benchmarks/eval_speed.py --model MODEL --requests mmlu.npz,gsm8k.npz \\
        [--device cuda --dtype bfloat16] [--hf-share 0.125] [--output DIR]

Both get the same token ids (or prompts) on the same device, one after the other in one process:
ours answers everything, ``hf`` (lm-eval's HFLM over transformers with SDPA) an evenly spread share
of the questions, at every batch size of ``--hf-batches``; its fastest counts, scaled to all. Where
text is generated, ``hf`` continues one batch of every size of ``--hf-gen-batches``, then batches of
the best size until ``--hf-gen-seconds`` are over; its batches are those that it forms from all
prompts (sorted by length), taken evenly spread, and the time is scaled by the number of prompts.
``--only mlx,mlx-lm`` does the same with the MLX backend and ``mlx_lm.evaluate``. Times include
moving data and, for prompts, tokenising; not loading, and not building prompts. On a busy machine
compare the CPU seconds. Scores and texts of the share are compared. Requests come from
``eval_requests.py record``; results (after every batch) and answers (for its ``score``) go to
``--output``. A MODEL directory without weights gets random ones.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from eval_peers import Answers, LmEval, MlxLm, Ours, Result, note, questions, release
from eval_requests import Requests, save_answers


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        model = usable(Path(options.model), Path(scratch))
        sets = {path.stem: cut(Requests.read(path), options) for path in options.requests}
        found: dict[str, dict[str, Any]] = {name: {} for name in sets}
        answers: dict[tuple[str, str], Answers] = {}
        for side in options.only.split(","):
            build = SIDES[side]
            start = time.perf_counter()
            runner = build(model, options)
            note(f"{side}: loaded in {time.perf_counter() - start:.1f} s")
            for name, requests in sets.items():

                def keep(result: Result, side: str = side, results: Result = found[name]) -> None:
                    results[side] = result
                    report(options, found)

                result, given = runner.measure(requests, keep)
                found[name][side] = result
                answers[name, side] = given
                compare(found[name], name, answers, requests)
                note(f"{name}, {side}: {json.dumps(result)}")
                if options.output:
                    options.output.mkdir(parents=True, exist_ok=True)
                    save_answers(options.output / f"{name}-{side}.npz", *given)
                report(options, found)
            del runner
            release()
    print(json.dumps(found))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="directory or GGUF file")
    parser.add_argument("--requests", required=True, type=paths, help="files, comma-separated")
    parser.add_argument("--only", default="ours,hf", help="of ours, hf, mlx, mlx-lm; in order")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, help="only the first questions of each file")
    parser.add_argument("--max-gen-toks", type=int, help="cap on generated tokens, for both")
    parser.add_argument("--together", type=int, help="prompts generated at a time; ours only")
    parser.add_argument("--hf-share", type=float, default=1.0, help="part of the questions")
    parser.add_argument("--hf-batches", default="16,32,64", type=numbers, help="for scoring")
    parser.add_argument("--hf-gen-batches", default="64,128,256", type=numbers)
    parser.add_argument("--hf-gen-seconds", type=float, default=120.0, help="no batch after them")
    parser.add_argument("--output", type=Path, help="directory for results.json and answers")
    return parser.parse_args()


def paths(text: str) -> list[Path]:
    return [Path(part) for part in text.split(",")]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def usable(model: Path, scratch: Path) -> Path:
    """A directory in Hugging Face layout that both sides load."""
    if model.is_file():
        from qwen2kit.weights.checkpoint import open_checkpoint
        from qwen2kit.weights.convert import convert

        convert(open_checkpoint(model), scratch / "hf", to="hf", dtype="bfloat16")
        return scratch / "hf"
    if any(model.glob("*.safetensors")):
        return model
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shutil.copytree(model, scratch / "random")
    config = AutoConfig.from_pretrained(model)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        scratch / "random"
    )
    return scratch / "random"


def cut(requests: Requests, options: argparse.Namespace) -> Requests:
    prompts = list(requests.prompts)[: options.limit]
    if options.max_gen_toks:
        prompts = [(text, kw | {"max_gen_toks": options.max_gen_toks}) for text, kw in prompts]
    groups = list(questions(requests))[: options.limit]
    return Requests([requests.scores[i] for group in groups for i in group], prompts)


def compare(
    found: dict[str, Any],
    name: str,
    answers: dict[tuple[str, str], Answers],
    requests: Requests,
) -> None:
    """Put agreement and ratios of times into ``found`` for the pairs that both have answered."""
    for side, peer in PAIRS:
        if side in found and peer in found and f"{side}/{peer}" not in found:
            ratios = {
                ratio: round(found[peer][unit] / found[side][unit], 2)
                for ratio, unit in (("speedup", "seconds"), ("cpu_speedup", "cpu_seconds"))
            }
            same = agreement(answers[name, side], answers[name, peer], requests)
            found[f"{side}/{peer}"] = ratios | same


def agreement(first: Answers, second: Answers, requests: Requests) -> dict[str, Any]:
    """Over the questions that the peer answered."""
    scored = [index for index, (logprob, _) in enumerate(second[0]) if logprob == logprob]
    prompts = [index for index, text in enumerate(second[1]) if text is not None]
    differences = [abs(first[0][i][0] - second[0][i][0]) for i in scored]
    answered = set(scored)
    groups = [group for group in questions(requests) if group[0] in answered]
    return {
        "logprobs": len(differences),
        "max_dlogp": max(differences, default=0.0),
        "median_dlogp": float(np.median(differences)) if differences else 0.0,
        "questions": len(groups),
        "same_choice": sum(choice(first, g) == choice(second, g) for g in groups),
        "texts": len(prompts),
        "same_texts": sum(first[1][i] == second[1][i] for i in prompts),
    }


def choice(answers: Answers, group: Sequence[int]) -> int:
    return int(np.argmax([answers[0][i][0] for i in group]))


def report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    import torch

    cuda = torch.cuda.is_available() and options.device != "cpu"
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    settings["requests"] = [path.name for path in options.requests]
    document = {
        "settings": settings | {"model": Path(options.model).name},
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "results": found,
    }
    text = json.dumps(document, indent=2)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(text + "\n")


SIDES: dict[str, Callable[[Path, argparse.Namespace], Any]] = {
    "ours": Ours,
    "hf": LmEval,
    "mlx": partial(Ours, backend="mlx"),
    "mlx-lm": MlxLm,
}
PAIRS = (("ours", "hf"), ("mlx", "mlx-lm"))
VERSIONS = ("torch", "transformers", "lm_eval", "accelerate")

if __name__ == "__main__":
    raise SystemExit(main())
