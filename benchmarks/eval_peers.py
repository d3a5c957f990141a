"""Who answers recorded requests in `eval_speed`: our backends, and what is built for the same."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from eval_requests import Requests

Answers = tuple[list[tuple[float, bool]], list[str]]


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

    def __init__(self, model: Path, options: argparse.Namespace, backend: str = "torch") -> None:
        from qwen2kit.backend.loading import load_model
        from qwen2kit.backend.plan import ExecutionPlan
        from qwen2kit_evals.harness import Qwen2KitLM

        device = "auto" if backend == "mlx" else options.device
        plan = ExecutionPlan(device=device, dtype=options.dtype)
        self.loaded = load_model(model, backend=backend, plan=plan)
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


class MlxLm:
    """``mlx_lm.evaluate``'s model; it takes one question at a time. Scores only."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        from mlx_lm.evaluate import MLXLM

        self.options = options
        self.lm = MLXLM(str(model), use_chat_template=False)

    def measure(self, requests: Requests) -> tuple[dict[str, Any], Answers]:
        from lm_eval.api.instance import Instance

        scored, _ = share(requests, self.options)
        asked = Requests([requests.scores[i] for i in scored])
        decode = self.lm.tokenizer.decode
        instances = [
            Instance("loglikelihood", {}, (decode(r.context), decode(r.continuation)), 0)
            for r in asked.scores
        ]
        start, cpu = time.perf_counter(), time.process_time()
        answers = self.lm.loglikelihood(instances)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        count, total = (len(list(questions(which))) for which in (asked, requests))
        return {
            "questions": count,
            "of": total,
            "seconds": round(seconds * total / count, 3),
            "cpu_seconds": round(cpu * total / count, 3),
            **{f"measured_{name}": value for name, value in sizes(asked).items()},
        }, spread_out((answers, []), scored, [], requests)


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
