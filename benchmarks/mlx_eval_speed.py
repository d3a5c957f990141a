"""Multiple-choice scoring on MLX beside ``mlx_lm.evaluate``, with random weights and questions.

    python benchmarks/mlx_eval_speed.py --shape qwen2-0.5b --form fp32 [--output F.json]

Questions are like MMLU's (5-shot: subjects share a prefix, four one-token choices) and like
HellaSwag's (no prefix, four continuations of some 20 tokens). mlx-lm's own ``loglikelihood`` runs
as it is, but for its tokenizer: texts are token ids with spaces between them. Both models live in
one process and take turns; scores are compared.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_speed import DTYPES, MlxLm, Ours, write_model

from qwen2kit.backend.protocol import ScoreRequest

Scores = list[tuple[float, bool]]


def mmlu(options: argparse.Namespace, rng: np.random.Generator) -> list[ScoreRequest]:
    requests = []
    for _ in range(options.subjects):
        shots = ids(rng, options.prefix)
        for _ in range(options.questions):
            context = (*shots, *ids(rng, options.question))
            requests += [ScoreRequest(context, (choice,)) for choice in (32, 33, 34, 35)]
    return requests


def hellaswag(options: argparse.Namespace, rng: np.random.Generator) -> list[ScoreRequest]:
    requests = []
    for _ in range(options.subjects * options.questions):
        context = ids(rng, options.question)
        requests += [ScoreRequest(context, ids(rng, int(rng.integers(12, 28)))) for _ in range(4)]
    return requests


def ids(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(rng.integers(100, 50_000, count).tolist())


def by_mlx_lm(model: Any, requests: list[ScoreRequest]) -> Scores:
    from mlx_lm.evaluate import MLXLM

    class ByIds(MLXLM):  # type: ignore[misc]
        def __init__(self) -> None:
            self._model, self._max_tokens = model, None

        def _tokenize(self, texts: list[str]) -> list[tuple[int, ...]]:
            return [tuple(map(int, text.split())) for text in texts]

    asked = [SimpleNamespace(args=(text(r.context), text(r.continuation))) for r in requests]
    return [(float(score), bool(best)) for score, best in ByIds().loglikelihood(asked)]


def text(tokens: tuple[int, ...]) -> str:
    return "".join(f" {token}" for token in tokens)


def by_us(model: Any, requests: list[ScoreRequest]) -> Scores:
    found = dict(model.score(requests))
    return [(found[i].logprob, found[i].is_greedy) for i in range(len(requests))]


def timed(run: Any, model: Any, requests: list[ScoreRequest]) -> tuple[float, Scores]:
    mx.synchronize()
    start = time.perf_counter()
    scores = run(model, requests)
    return time.perf_counter() - start, scores


def measure(ours: Any, theirs: Any, requests: list[ScoreRequest], repeats: int) -> dict[str, Any]:
    few = requests[:8]
    by_us(ours, few), by_mlx_lm(theirs, few)
    pairs = []
    for _ in range(repeats):
        mine, scores = timed(by_us, ours, requests)
        other, expected = timed(by_mlx_lm, theirs, requests)
        pairs.append((mine, other))
    gaps = [abs(a[0] - b[0]) for a, b in zip(scores, expected, strict=True)]
    return {
        "requests": len(requests),
        "prompt_tokens": sum(len(r.context) + len(r.continuation) for r in requests),
        "ours_s": [mine for mine, _ in pairs],
        "mlx_lm_s": [other for _, other in pairs],
        "speedup": float(np.median([other / mine for mine, other in pairs])),
        "largest_gap_nats": max(gaps),
        "same_greedy": sum(a[1] == b[1] for a, b in zip(scores, expected, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen2-0.5b")
    parser.add_argument("--form", default="fp32", choices=DTYPES)
    parser.add_argument("--subjects", type=int, default=4)
    parser.add_argument("--questions", type=int, default=25, help="per subject")
    parser.add_argument("--prefix", type=int, default=600, help="tokens that a subject shares")
    parser.add_argument("--question", type=int, default=80, help="tokens of a question")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"mlx": mx.__version__, "options": str(options)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_model(options.shape, options.form, folder)
        ours, theirs = Ours(folder, options.form).model, MlxLm(folder, options.form).model
        for kind in (mmlu, hellaswag):
            requests = kind(options, np.random.default_rng(0))
            result = report[kind.__name__] = measure(ours, theirs, requests, options.repeats)
            print(f"{kind.__name__}: {json.dumps(result)}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
