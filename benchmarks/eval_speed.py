"""Recorded benchmark requests through our engine and through lm-eval's own ``hf`` model.

    python benchmarks/eval_speed.py --model MODEL --requests mmlu.npz,gsm8k.npz \\
        [--device cuda --dtype bfloat16] [--hf-share 0.125] [--output DIR]

Both get the same token ids (or prompts) on the same device, one after the other in one process:
ours answers everything, ``hf`` (lm-eval's HFLM over transformers with SDPA) an evenly spread share
of the questions, at every batch size of ``--hf-batches``; its fastest counts, scaled to all. Times
include moving data and, for prompts, tokenising; not loading, and not building prompts. On a busy
machine compare the CPU seconds. Scores and texts of the share are compared. Requests come from
``eval_requests.py record``; answers go to ``--output`` for its ``score``. A MODEL directory without
weights gets random ones.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from eval_requests import Requests, save_answers

Answers = tuple[list[tuple[float, bool]], list[str]]


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        model = usable(Path(options.model), Path(scratch))
        sets = {path.stem: cut(Requests.read(path), options) for path in options.requests}
        found: dict[str, dict[str, Any]] = {name: {} for name in sets}
        answers: dict[str, Answers] = {}
        for side in options.only.split(","):
            build = {"ours": Ours, "hf": LmEval}[side]
            start = time.perf_counter()
            runner = build(model, options)
            note(f"{side}: loaded in {time.perf_counter() - start:.1f} s")
            for name, requests in sets.items():
                result, given = runner.measure(requests)
                found[name][side] = result
                compare(found[name], answers.setdefault(name, given), given, requests, options)
                note(f"{name}, {side}: {json.dumps(result)}")
                if options.output:
                    options.output.mkdir(parents=True, exist_ok=True)
                    save_answers(options.output / f"{name}-{side}.npz", *given)
                    report(options, found)
            del runner
            release()
    report(options, found)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="directory or GGUF file")
    parser.add_argument("--requests", required=True, type=paths, help="files, comma-separated")
    parser.add_argument("--only", default="ours,hf")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, help="only the first questions of each file")
    parser.add_argument("--max-gen-toks", type=int, help="cap on generated tokens, for both")
    parser.add_argument("--together", type=int, help="prompts generated at a time; ours only")
    parser.add_argument("--hf-share", type=float, default=1.0, help="part of the questions")
    parser.add_argument("--hf-batches", default="16,32,64", type=numbers, help="for scoring")
    parser.add_argument("--hf-gen-batches", default="64,128,256", type=numbers)
    parser.add_argument("--hf-gen-prompts", type=int, default=256, help="at most so many")
    parser.add_argument("--output", type=Path, help="directory for results.json and answers")
    return parser.parse_args()


def paths(text: str) -> list[Path]:
    return [Path(part) for part in text.split(",")]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronized() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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


def questions(requests: Requests) -> Iterator[list[int]]:
    """Indices of the requests of each question: neighbours with one context, or one alone."""
    group: list[int] = []
    for index, request in enumerate(requests.scores):
        if group and request.context != requests.scores[group[0]].context:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def share(requests: Requests, options: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Which requests and which prompts ``hf`` answers: evenly spread over all."""
    groups = list(questions(requests))
    chosen = spread(len(groups), max(1, round(len(groups) * options.hf_share)))
    count = min(options.hf_gen_prompts, max(1, round(len(requests.prompts) * options.hf_share)))
    return [i for g in chosen for i in groups[g]], spread(len(requests.prompts), count)


def spread(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int)).tolist()


class Ours:
    """Through the backend protocol, as ``qwen2kit eval`` does it."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        from qwen2kit.backend.loading import load_model
        from qwen2kit.backend.plan import ExecutionPlan
        from qwen2kit_evals.harness import Qwen2KitLM

        plan = ExecutionPlan(device=options.device, dtype=options.dtype)
        self.loaded = load_model(model, backend="torch", plan=plan)
        self.lm = Qwen2KitLM(self.loaded, batch_size=options.together or "auto")

    def measure(self, requests: Requests) -> tuple[dict[str, Any], Answers]:
        from qwen2kit.generate.prefix import plan_scores

        few = Requests(requests.scores[:64], requests.prompts[:2])
        self._answer(few)  # kernels are chosen and compiled
        start, cpu = synchronized(), time.process_time()
        answers = self._answer(requests)
        result: dict[str, Any] = {
            "seconds": round(synchronized() - start, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            **sizes(requests),
        }
        if requests.scores:
            steps = plan_scores(requests.scores)
            result["computed_tokens"] = sum(len(step.feed) for step in steps)
        else:
            result["generated_tokens"] = sum(map(len, self._encode(answers[1])))
        return result, answers

    def _answer(self, requests: Requests) -> Answers:
        scores = self.lm._score(requests.scores, True) if requests.scores else []
        return scores, generated(self.lm, requests)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.loaded.tokenizer.encode_many(texts)


class LmEval:
    """lm-eval's HFLM, unchanged."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        import torch
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        network = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
        )
        self.options = options
        self.lm = HFLM(
            network.to(options.device).eval(), tokenizer=AutoTokenizer.from_pretrained(model)
        )

    def measure(self, requests: Requests) -> tuple[dict[str, Any], Answers]:
        scored, prompts = share(requests, self.options)
        asked = Requests(
            [requests.scores[i] for i in scored], [requests.prompts[i] for i in prompts]
        )
        tried, cpu, answers = self._at_batch_sizes(asked)
        best = min(tried, key=tried.__getitem__)
        count = len(list(questions(asked))) or len(prompts)
        total = len(list(questions(requests))) or len(requests.prompts)
        return {
            "seconds_by_batch_size": tried,
            "best_batch_size": int(best),
            "questions": count,
            "of": total,
            "seconds": round(tried[best] * total / count, 3),
            "cpu_seconds": round(cpu[best] * total / count, 3),
            **{f"measured_{name}": value for name, value in sizes(asked).items()},
        }, spread_out(answers, scored, prompts, requests)

    def _answer(self, asked: Requests) -> Answers:
        triples = [(None, [*r.context], [*r.continuation]) for r in asked.scores]
        scores = self.lm._loglikelihood_tokens(triples, disable_tqdm=True) if triples else []
        return scores, generated(self.lm, asked)

    def _at_batch_sizes(
        self, asked: Requests
    ) -> tuple[dict[str, float], dict[str, float], Answers]:
        import torch

        tried: dict[str, float] = {}
        cpu: dict[str, float] = {}
        answers: Answers = ([], [])
        self.lm.batch_size_per_gpu = 1
        self._answer(Requests(asked.scores[:8], asked.prompts[:1]))  # not counted
        few = self.options.hf_batches if asked.scores else self.options.hf_gen_batches
        for size in few:
            self.lm.batch_size_per_gpu = size
            try:
                start, before = synchronized(), time.process_time()
                answers = self._answer(asked)
                tried[str(size)] = round(synchronized() - start, 3)
                cpu[str(size)] = round(time.process_time() - before, 3)
            except torch.OutOfMemoryError:
                note(f"hf: batch size {size} is out of memory")
            release()
        return tried, cpu, answers


def generated(lm: Any, requests: Requests) -> list[str]:
    from lm_eval.api.instance import Instance

    if not requests.prompts:
        return []
    instances = [
        Instance(request_type="generate_until", doc={}, arguments=(text, dict(kwargs)), idx=0)
        for text, kwargs in requests.prompts
    ]
    texts: list[str] = lm.generate_until(instances, disable_tqdm=True)
    return texts


def spread_out(
    answers: Answers, scored: Sequence[int], prompts: Sequence[int], requests: Requests
) -> Answers:
    """Answers in their places among all requests; NaN and empty elsewhere."""
    scores = [(float("nan"), False)] * len(requests.scores)
    texts = [""] * len(requests.prompts)
    for index, answer in zip(scored, answers[0], strict=True):
        scores[index] = answer
    for index, text in zip(prompts, answers[1], strict=True):
        texts[index] = text
    return scores, texts


def sizes(requests: Requests) -> dict[str, int]:
    inputs = {(*r.context, *r.continuation[:-1]) for r in requests.scores}
    return {
        "requests": len(requests.scores) or len(requests.prompts),
        "distinct_tokens": sum(map(len, inputs)),
    }


def compare(
    found: dict[str, Any],
    first: Answers,
    second: Answers,
    requests: Requests,
    options: argparse.Namespace,
) -> None:
    """Put agreement and the ratio of times into ``found`` once both sides are known."""
    if "ours" not in found or "hf" not in found:
        return
    scored, prompts = share(requests, options)
    differences = [abs(first[0][i][0] - second[0][i][0]) for i in scored]
    groups = [g for g in questions(requests) if g[0] in set(scored)]
    for name, unit in (("speedup", "seconds"), ("cpu_speedup", "cpu_seconds")):
        found[name] = round(found["hf"][unit] / found["ours"][unit], 2)
    found["compared"] = {
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
    settings = {key: str(value) for key, value in vars(options).items() if value is not None}
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
    print(json.dumps(found))


VERSIONS = ("torch", "transformers", "lm_eval", "accelerate")

if __name__ == "__main__":
    raise SystemExit(main())
