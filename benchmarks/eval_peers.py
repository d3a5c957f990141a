"""Who answers recorded requests in `eval_speed`: our backends, and what is built for the same."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from eval_requests import Requests

Result = dict[str, Any]
Answers = tuple[list[tuple[float, bool]], list[str | None]]
Keep = Callable[[Result], None]


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


def share(requests: Requests, part: float) -> list[int]:
    """Requests of ``part`` of the questions, evenly spread over all."""
    groups = list(questions(requests))
    chosen = spread(len(groups), max(1, round(len(groups) * part)))
    return [index for number in chosen for index in groups[number]]


def spread(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int)).tolist()


def scattered(total: int) -> list[int]:
    """All numbers below ``total``, the middle first; every beginning is evenly spread."""
    golden = (5**0.5 - 1) / 2
    return list(dict.fromkeys(int(total * ((0.5 + i * golden) % 1)) for i in range(4 * total)))


@dataclass(frozen=True)
class Timed:
    """What a number of prompts took, in seconds."""

    prompts: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: Timed) -> Timed:
        return Timed(
            self.prompts + other.prompts,
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
        )


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

    def measure(self, requests: Requests, keep: Keep) -> tuple[Result, Answers]:
        from qwen2kit.generate.prefix import plan_scores

        few = Requests(requests.scores[:64], requests.prompts[:2])
        self._answer(few)  # kernels are chosen and compiled
        start, cpu = synchronized(), time.process_time()
        answers = self._answer(requests)
        result: Result = {
            "seconds": round(synchronized() - start, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            **sizes(requests),
        }
        if requests.scores:
            steps = plan_scores(requests.scores)
            result["computed_tokens"] = sum(len(step.feed) for step in steps)
        else:
            result["generated_tokens"] = sum(map(len, self._encode(filter(None, answers[1]))))
        return result, answers

    def _answer(self, requests: Requests) -> Answers:
        scores = self.lm._score(requests.scores, True) if requests.scores else []
        return scores, [*generated(self.lm, requests)]

    def _encode(self, texts: Iterable[str]) -> list[list[int]]:
        return self.loaded.tokenizer.encode_many(list(texts))


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

    def measure(self, requests: Requests, keep: Keep) -> tuple[Result, Answers]:
        return self._generate(requests, keep) if requests.prompts else self._score(requests)

    def _score(self, requests: Requests) -> tuple[Result, Answers]:
        """A share of the questions at every batch size."""
        scored = share(requests, self.options.hf_share)
        asked = Requests([requests.scores[i] for i in scored])
        triples = [(None, [*r.context], [*r.continuation]) for r in asked.scores]
        self._scores(triples[:8], 1)  # not counted
        tried: dict[str, Timed] = {}
        answers: list[tuple[float, bool]] = []
        for size in self.options.hf_batches:
            with self._memory(size):
                start, before = synchronized(), time.process_time()
                answers = self._scores(triples, size)
                tried[str(size)] = since(start, before, 0)
        best = min(tried, key=lambda size: tried[size].seconds)
        count, total = (len(list(questions(which))) for which in (asked, requests))
        return {
            "seconds_by_batch_size": {size: round(t.seconds, 3) for size, t in tried.items()},
            "best_batch_size": int(best),
            "questions": count,
            "of": total,
            "seconds": round(tried[best].seconds * total / count, 3),
            "cpu_seconds": round(tried[best].cpu_seconds * total / count, 3),
            **{f"measured_{name}": value for name, value in sizes(asked).items()},
        }, spread_out(answers, scored, requests)

    def _scores(self, triples: Sequence[Any], size: int) -> list[tuple[float, bool]]:
        self.lm.batch_size_per_gpu = size
        found: list[tuple[float, bool]] = self.lm._loglikelihood_tokens(triples, disable_tqdm=True)
        return found

    def _generate(self, requests: Requests, keep: Keep) -> tuple[Result, Answers]:
        """Batches as ``hf`` forms them from all prompts, longest first: the middle one at every
        size, then, at the best size, scattered ones until the time is over."""
        prompts = requests.prompts
        encoded = self.lm.tokenizer([text for text, _ in prompts])["input_ids"]
        order = sorted(range(len(prompts)), key=lambda i: (-len(encoded[i]), prompts[i][0]))
        start = time.perf_counter()
        tried: dict[int, Timed] = {}
        texts: dict[int, list[str | None]] = {}

        def measured(size: int, number: int) -> Timed:
            batch = order[number * size : (number + 1) * size]
            self.lm.batch_size_per_gpu = size
            begun, cpu = synchronized(), time.process_time()
            found = generated(self.lm, Requests(prompts=[prompts[i] for i in batch]))
            spent = since(begun, cpu, len(batch))
            given = texts.setdefault(size, [None] * len(prompts))
            for index, text in zip(batch, found, strict=True):
                given[index] = text
            return spent

        def over(part: float) -> bool:
            return time.perf_counter() - start > part * self.options.hf_gen_seconds

        generated(self.lm, Requests(prompts=[(prompts[0][0], {"max_gen_toks": 8})]))  # not counted
        for size in self.options.hf_gen_batches:
            if not tried or not over(0.5):
                with self._memory(size):
                    tried[size] = measured(size, scattered(count(order, size))[0])
        best = min(tried, key=lambda size: tried[size].seconds / tried[size].prompts)
        total = Timed()
        batches = scattered(count(order, best))
        for done, number in enumerate(batches, 1):
            total += measured(best, number) if total.prompts else tried[best]
            result = self._generation(tried, total, best, len(prompts))
            result["batches"] = f"{done} of {len(batches)}"
            keep(result)
            note(f"hf: {json.dumps(result)}")
            if over(1):
                break
        return result, ([], texts[best])

    @staticmethod
    def _generation(tried: dict[int, Timed], total: Timed, best: int, prompts: int) -> Result:
        scale = prompts / total.prompts
        return {
            "seconds_of_one_batch": {str(n): round(t.seconds, 3) for n, t in tried.items()},
            "best_batch_size": best,
            "questions": total.prompts,
            "of": prompts,
            "measured_seconds": round(total.seconds, 3),
            "seconds": round(total.seconds * scale, 3),
            "cpu_seconds": round(total.cpu_seconds * scale, 3),
        }

    @contextmanager
    def _memory(self, size: int) -> Iterator[None]:
        import torch

        try:
            yield
        except torch.OutOfMemoryError:
            note(f"hf: batch size {size} is out of memory")
        release()


class MlxLm:
    """``mlx_lm.evaluate``'s model; it takes one question at a time. Scores only."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        from mlx_lm.evaluate import MLXLM

        self.options = options
        self.lm = MLXLM(str(model), use_chat_template=False)

    def measure(self, requests: Requests, keep: Keep) -> tuple[Result, Answers]:
        from lm_eval.api.instance import Instance

        scored = share(requests, self.options.hf_share)
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
        }, spread_out(answers, scored, requests)


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


def count(items: Sequence[object], size: int) -> int:
    """Batches of ``size`` that hold all items."""
    return -(-len(items) // size)


def since(start: float, cpu_start: float, prompts: int) -> Timed:
    return Timed(prompts, synchronized() - start, time.process_time() - cpu_start)


def spread_out(
    answers: Sequence[tuple[float, bool]], scored: Sequence[int], requests: Requests
) -> Answers:
    """Answers in their places among all requests; NaN elsewhere."""
    scores = [(float("nan"), False)] * len(requests.scores)
    for index, answer in zip(scored, answers, strict=True):
        scores[index] = answer
    return scores, []


def sizes(requests: Requests) -> dict[str, int]:
    inputs = {(*r.context, *r.continuation[:-1]) for r in requests.scores}
    return {
        "requests": len(requests.scores) or len(requests.prompts),
        "distinct_tokens": sum(map(len, inputs)),
    }
