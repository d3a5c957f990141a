"""From a file of programming problems to pass@k: complete, run, count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.errors import ConfigError, TokenizerError
from qwen2kit_evals.answering import answer
from qwen2kit_evals.averages import mean_and_stderr
from qwen2kit_evals.chat import render
from qwen2kit_evals.code_eval import CodeEval, joined, pass_at_k
from qwen2kit_evals.code_problems import CodeProblem
from qwen2kit_evals.request_log import RequestLog

_REQUEST = "Complete this Python program. Answer with the whole program in one code block.\n\n{}"
_FENCE = "```python\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeOptions:
    """How programs are generated and counted.

    Attributes:
        samples: programs per problem.
        k: the k of each pass@k; none may exceed ``samples``.
        temperature, top_p: of sampling; temperature 0 is greedy.
        max_tokens: length limit of a completion.
        chat: put the prompt into the model's chat template, as the beginning of its answer.
        seed: of sampling.

    Raises:
        ConfigError: a value is out of range, or several greedy samples are asked for.
    """

    samples: int = 1
    k: tuple[int, ...] = (1,)
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    chat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or max(self.k) > self.samples:
            raise ConfigError(f"--k needs numbers from 1 to --samples ({self.samples})")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError("several --samples need a --temperature above 0, or all are equal")

    def gen_kwargs(self, stop: Sequence[str]) -> dict[str, Any]:
        """lm-eval's arguments of one generation."""
        until = ["\n```"] if self.chat else list(stop)
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {
            "until": until,
            "max_gen_toks": self.max_tokens,
            "do_sample": self.temperature > 0,
        } | (sampling if self.temperature > 0 else {})


def run_problems(
    loaded: LoadedModel,
    problems: Sequence[CodeProblem],
    code: CodeEval,
    options: CodeOptions,
    *,
    log: RequestLog,
    batch_size: int | None,
) -> list[dict[str, Any]]:
    """One row per program: problem, completion, and how it ended under each kind of test.

    Raises:
        TokenizerError: ``options.chat`` without a chat template.
        Qwen2KitError: as `answer` and `CodeEval.run`.
    """
    completions = _complete(loaded, problems, options, log, batch_size)
    asked = [
        (problem, kind, text)
        for problem, texts in zip(problems, completions, strict=True)
        for text in texts
        for kind in problem.tests
    ]
    programs = [joined([p.prompt + text], p.tests[kind])[0] for p, kind, text in asked]
    outcomes = dict(zip(programs, code.run(programs), strict=True))
    rows = []
    for problem, texts in zip(problems, completions, strict=True):
        for number, text in enumerate(texts):
            ends = {
                kind: outcomes[joined([problem.prompt + text], test)[0]]
                for kind, test in problem.tests.items()
            }
            rows.append(
                {
                    "problem": problem.name,
                    "sample": number,
                    "completion": text,
                    "passed": {kind: end.passed for kind, end in ends.items()},
                    "verdict": {kind: end.verdict for kind, end in ends.items()},
                    "detail": {kind: end.detail for kind, end in ends.items()},
                    "output": {kind: end.output for kind, end in ends.items()},
                }
            )
    return rows


def scores(rows: Sequence[Mapping[str, Any]], k: Sequence[int]) -> list[dict[str, Any]]:
    """Mean pass@k per kind of test, with the standard error over problems.

    A kind that some problems lack is counted over those that have it.
    """
    found = []
    for kind in dict.fromkeys(kind for row in rows for kind in row["passed"]):
        passes: dict[str, list[bool]] = {}
        for row in rows:
            if kind in row["passed"]:
                passes.setdefault(row["problem"], []).append(row["passed"][kind])
        for size in k:
            values = [pass_at_k(len(p), sum(p), size) for p in passes.values()]
            value, stderr = mean_and_stderr(values)
            found.append(
                {
                    "tests": kind,
                    "metric": f"pass@{size}",
                    "value": value,
                    "stderr": stderr,
                    "problems": len(values),
                }
            )
    return found


def _complete(
    loaded: LoadedModel,
    problems: Sequence[CodeProblem],
    options: CodeOptions,
    log: RequestLog,
    batch_size: int | None,
) -> list[list[str]]:
    """``options.samples`` completions of every problem."""
    if options.chat and loaded.tokenizer.chat_template is None:
        raise TokenizerError("the model has no chat template; leave --chat-template out")
    completions: dict[str, list[str]] = {problem.name: [] for problem in problems}
    for stop in dict.fromkeys(problem.stop for problem in problems):
        same = [p for p in problems if p.stop == stop for _ in range(options.samples)]
        texts = answer(
            loaded,
            [_prompt(loaded, problem, options.chat) for problem in same],
            options.gen_kwargs(stop),
            log=log,
            batch_size=batch_size,
            seed=options.seed,
            label="Writing programs",
        )
        for problem, text in zip(same, texts, strict=True):
            completions[problem.name].append(text)
    return [completions[problem.name] for problem in problems]


def _prompt(loaded: LoadedModel, problem: CodeProblem, chat: bool) -> str:
    if not chat:
        return problem.prompt
    messages = [
        {"role": "user", "content": _REQUEST.format(f"{_FENCE}{problem.prompt}\n```")},
        {"role": "assistant", "content": _FENCE + problem.prompt},
    ]
    return render(loaded.tokenizer, messages, add_generation_prompt=False)
