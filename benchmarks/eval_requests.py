"""Benchmark requests without the benchmark: record them here, answer them elsewhere, score here.

    python benchmarks/eval_requests.py record MODEL --tasks mmlu --num-fewshot 5 --datasets DIR \\
        --output mmlu.npz
    python benchmarks/eval_speed.py --requests mmlu.npz ... --output answers   # on any machine
    python benchmarks/eval_requests.py score MODEL --tasks mmlu --num-fewshot 5 --datasets DIR \\
        --requests mmlu.npz --answers answers/mmlu-ours.npz --output eval-results/mmlu

A machine with a GPU then needs neither lm-eval's tasks nor their data. Recording runs lm-eval with
a model that answers nothing; scoring runs it again with every answer found in the request log, so
metrics and results are those of ``qwen2kit eval``.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.protocol import ScoreRequest

Prompt = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Requests:
    """What a set of tasks asks: token ids to score, or prompts with generation arguments."""

    scores: Sequence[ScoreRequest] = ()
    prompts: Sequence[Prompt] = ()

    def save(self, path: Path) -> None:
        contexts = list(dict.fromkeys(request.context for request in self.scores))
        numbers = {context: number for number, context in enumerate(contexts)}
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            contexts=_flat(contexts),
            context_ends=_ends(contexts),
            owners=np.array([numbers[r.context] for r in self.scores], dtype=np.uint32),
            continuations=_flat(r.continuation for r in self.scores),
            continuation_ends=_ends(r.continuation for r in self.scores),
            prompts=np.frombuffer(gzip.compress(json.dumps(self.prompts).encode()), np.uint8),
        )

    @classmethod
    def read(cls, path: Path) -> Requests:
        with np.load(path, allow_pickle=False) as file:
            contexts = list(_parts(file["contexts"], file["context_ends"]))
            continuations = _parts(file["continuations"], file["continuation_ends"])
            owners = file["owners"].tolist()
            prompts = json.loads(gzip.decompress(file["prompts"].tobytes()))
            scores = [
                ScoreRequest(contexts[owner], continuation)
                for owner, continuation in zip(owners, continuations, strict=True)
            ]
        return cls(scores, [(prompt, arguments) for prompt, arguments in prompts])


def _flat(rows: Iterable[Sequence[int]]) -> NDArray[np.uint32]:
    return np.array([token for row in rows for token in row], dtype=np.uint32)


def _ends(rows: Iterable[Sequence[int]]) -> NDArray[np.uint32]:
    return np.cumsum([len(row) for row in rows], dtype=np.uint32)


def _parts(flat: NDArray[np.uint32], ends: NDArray[np.uint32]) -> Iterator[tuple[int, ...]]:
    for start, end in pairwise([0, *ends.tolist()]):
        yield tuple(flat[start:end].tolist())


def save_answers(
    path: Path, scores: Sequence[tuple[float, bool]], texts: Sequence[str | None]
) -> None:
    """Answers in the order of the requests; a request without one has NaN or None."""
    np.savez_compressed(
        path,
        logprobs=np.array([logprob for logprob, _ in scores]),
        greedy=np.array([greedy for _, greedy in scores], dtype=np.bool_),
        texts=np.frombuffer(gzip.compress(json.dumps(texts).encode()), np.uint8),
    )


def read_answers(path: Path) -> tuple[list[tuple[float, bool]], list[str | None]]:
    with np.load(path, allow_pickle=False) as file:
        scores = list(zip(file["logprobs"].tolist(), file["greedy"].tolist(), strict=True))
        return scores, json.loads(gzip.decompress(file["texts"].tobytes()))


class _SpecOnly:
    """Stands where a compiled model would: nothing is computed here."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.limit = spec.context_length


def described(options: argparse.Namespace) -> Any:
    """The model's files and plan, without weights in memory."""
    from qwen2kit.adapters.merge import open_model
    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.backend.protocol import LoadReport
    from qwen2kit.backend.registry import get

    checkpoint = open_model(options.model, None)
    return LoadedModel(
        checkpoint=checkpoint,
        tokenizer=checkpoint.tokenizer(),
        backend=get(options.backend),
        model=_SpecOnly(checkpoint.spec),  # type: ignore[arg-type]
        report=LoadReport(tensors=0, bytes=0, seconds=0.0),
        plan=ExecutionPlan(device=options.device, dtype=options.dtype),
    )


def record(options: argparse.Namespace) -> int:
    from qwen2kit_evals.harness import Qwen2KitLM
    from qwen2kit_evals.run import run_tasks

    class Recorder(Qwen2KitLM):
        found = Requests()

        def _score(self, requests: Iterable[ScoreRequest], *args: Any, **kwargs: Any) -> Any:
            self.found = replace(self.found, scores=list(requests))
            return [(0.0, False)] * len(self.found.scores)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            self.found = replace(self.found, prompts=[request.args for request in requests])
            return [""] * len(requests)

    recorder = Recorder(described(options))
    with consent(options):
        run_tasks(recorder, selected(options), limit=options.limit, log_samples=False)
    recorder.found.save(options.output)
    print(
        f"{len(recorder.found.scores)} to score, {len(recorder.found.prompts)} to continue, "
        f"{options.output.stat().st_size / 1e6:.1f} MB"
    )
    return 0


def score(options: argparse.Namespace) -> int:
    """Fill the request log with the answers, then evaluate: nothing is left to compute."""
    from rich.console import Console

    from qwen2kit_evals.harness import Qwen2KitLM
    from qwen2kit_evals.provenance import answers_digest, model_provenance
    from qwen2kit_evals.request_log import FILE, RequestLog
    from qwen2kit_evals.run import evaluate

    loaded = described(options)
    lm = Qwen2KitLM(loaded)
    asked, (scores, texts) = Requests.read(options.requests), read_answers(options.answers)
    with RequestLog(options.output / FILE, answers_digest(model_provenance(loaded))) as log:
        for key, answer in zip(log.score_keys(asked.scores), scores, strict=True):
            log.add(key, answer)
        keys = log.text_keys(asked.prompts, [lm.seed, lm.max_gen_toks])
        for key, text in zip(keys, texts, strict=True):
            log.add(key, text)
    with consent(options):
        result = evaluate(loaded, selected(options), limit=options.limit, output=options.output)
    Console().print(result.table())
    return 0


def selected(options: argparse.Namespace) -> Any:
    from qwen2kit_evals.tasks import select_tasks

    return select_tasks([options.tasks], datasets=options.datasets, num_fewshot=options.num_fewshot)


def consent(options: argparse.Namespace) -> Any:
    from qwen2kit.cli.eval_code import code_runner
    from qwen2kit_evals.code_eval import code_execution

    if not options.allow_code_execution:
        return nullcontext()
    return code_execution(code_runner(True, False))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for name, run in (("record", record), ("score", score)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("model", help="the model whose tokenizer and context limit count")
        command.add_argument("--tasks", required=True)
        command.add_argument("--num-fewshot", type=int)
        command.add_argument("--limit", type=float)
        command.add_argument("--datasets", help="data in Hub layout; default the Hub itself")
        command.add_argument("--allow-code-execution", action="store_true")
        command.add_argument("--output", type=Path, required=True)
        command.add_argument("--backend", default="torch", help="that gave the answers")
        command.add_argument("--device", default="cuda:0", help="where it ran")
        command.add_argument("--dtype", default="bfloat16")
        if run is score:
            command.add_argument("--requests", type=Path, required=True)
            command.add_argument("--answers", type=Path, required=True)
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    raise SystemExit(main())
