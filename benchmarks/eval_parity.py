"""Hold our lm-eval adapter against lm-eval's own ``hf`` model, sample by sample, in float32.

    python benchmarks/eval_parity.py --model DIR --datasets DIR --tasks mmlu,gsm8k,arc_challenge \\
        --limit 20 --backends torch,mlx --output eval-parity.json

Every implementation gets the same tasks, shots and prompts. Per task: the largest difference of
log-probabilities in nats, whether the same answers win and the same texts are generated, and the
wall time. Exits with 7 if a difference exceeds the tolerance or an answer differs. Over a long text
(rolling tasks) the rounding of ``hf``'s float32 log-softmax adds up; ``--hf-softmax float64`` ends
that; `rolling_parity.py` measures both against float64.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qwen2kit.backend.loading import load_model
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.cli.eval_code import code_runner
from qwen2kit.errors import Qwen2KitError
from qwen2kit.weights.checkpoint import open_checkpoint
from qwen2kit_evals.code_eval import code_execution
from qwen2kit_evals.compare import Agreement, compare_samples
from qwen2kit_evals.harness import Qwen2KitLM
from qwen2kit_evals.provenance import model_provenance
from qwen2kit_evals.results import plain, sample_rows
from qwen2kit_evals.run import run_tasks
from qwen2kit_evals.tasks import TaskSelection, select_tasks

Samples = dict[str, list[dict[str, Any]]]


def main() -> int:
    options = arguments()
    try:
        with code_execution(code_runner(options.allow_code_execution, False)):
            return compare(options)
    except Qwen2KitError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="directory in Hugging Face layout")
    parser.add_argument("--datasets", help="data in Hub layout; default the Hub itself")
    parser.add_argument("--tasks", default="mmlu,gsm8k,arc_challenge")
    parser.add_argument("--limit", type=float, default=10, help="documents per task")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--max-gen-toks", type=int, help="cap on generated tokens, for speed")
    parser.add_argument("--backends", default="torch,mlx")
    parser.add_argument("--device", default="cpu", help="of the hf model and the torch backend")
    parser.add_argument("--batch-size", type=int, default=1, help="generation, ours and hf's")
    parser.add_argument(
        "--hf-softmax", default="float32", help="dtype of the hf model's log-softmax"
    )
    parser.add_argument("--allow-code-execution", action="store_true")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="nats")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


def compare(options: argparse.Namespace) -> int:
    selection = select_tasks(
        [options.tasks], datasets=options.datasets, num_fewshot=options.num_fewshot
    )
    cap_generation(selection, options.max_gen_toks)
    timings: dict[str, dict[str, float]] = {}
    theirs, timings["hf"] = measured(lambda: hf_model(options), selection, options.limit)
    document: dict[str, Any] = {"settings": vars(options) | {"dtype": "float32"}, "backends": {}}
    failed = False
    for backend in options.backends.split(","):
        held: list[Qwen2KitLM] = []

        def build(backend: str = backend, held: list[Qwen2KitLM] = held) -> Qwen2KitLM:
            held.append(our_model(options, backend))
            return held[0]

        ours, timings[backend] = measured(build, selection, options.limit)
        found = {task: compare_samples(ours[task], theirs[task]) for task in theirs}
        show(backend, found, timings[backend], timings["hf"])
        failed |= any(not passes(agreement, options.tolerance) for agreement in found.values())
        document["backends"][backend] = {
            "model": model_provenance(held[0].loaded),
            "tasks": {task: asdict(agreement) for task, agreement in found.items()},
        }
        held.clear()
        gc.collect()
    document |= {"seconds": timings, "passed": not failed}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(plain(document), indent=2) + "\n")
    print("FAIL" if failed else "PASS", f"(tolerance {options.tolerance:g} nats)")
    return 7 if failed else 0


def measured(
    build: Callable[[], Any], selection: TaskSelection, limit: float
) -> tuple[Samples, dict[str, float]]:
    """Samples of every task, with seconds to load the model and to run."""
    start = time.perf_counter()
    model = build()
    loaded = time.perf_counter()
    report = run_tasks(model, selection, limit=limit)
    seconds = {"load": loaded - start, "run": time.perf_counter() - loaded}
    del model
    gc.collect()
    return {task: sample_rows(rows) for task, rows in report["samples"].items()}, seconds


def hf_model(options: argparse.Namespace) -> Any:
    """lm-eval's own model, with our prefix for empty contexts (its default is the eos token)."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = open_checkpoint(Path(options.model)).tokenizer()
    return HFLM(
        options.model,
        device=options.device,
        dtype="float32",
        softmax_dtype=options.hf_softmax,
        batch_size=options.batch_size,
        prefix_token_id=tokenizer.eot_id,
    )


def our_model(options: argparse.Namespace, backend: str) -> Qwen2KitLM:
    device = options.device if backend == "torch" else "auto"
    plan = ExecutionPlan(dtype="float32", device=device)
    loaded = load_model(options.model, backend=backend, plan=plan)
    return Qwen2KitLM(loaded, batch_size=options.batch_size)


def cap_generation(selection: TaskSelection, limit: int | None) -> None:
    """Shorten every generation to ``limit`` tokens, for all implementations alike."""
    if limit is None:
        return
    for task in selection.manager.load(list(selection.objects))["tasks"].values():
        if task.config.output_type == "generate_until":
            task.config.generation_kwargs["max_gen_toks"] = limit


def passes(agreement: Agreement, tolerance: float) -> bool:
    return agreement.max_dlogp <= tolerance and agreement.same_answers


def show(
    backend: str,
    found: dict[str, Agreement],
    ours: dict[str, float],
    theirs: dict[str, float],
) -> None:
    table = Table(title=f"{backend} against lm-eval hf, float32", title_justify="left")
    for heading in ("task", "docs", "logprobs", "max |dlogp|", "answers", "greedy", "texts"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, a in sorted(found.items(), key=lambda item: -item[1].max_dlogp):
        table.add_row(
            task,
            str(a.documents),
            str(a.logprobs),
            f"{a.max_dlogp:.2e}" if a.logprobs else "",
            equal(a.documents, a.answers_differ) if a.logprobs else "",
            equal(a.logprobs, a.greedy_differ) if a.logprobs else "",
            equal(a.generations, a.generations_differ) if a.generations else "",
        )
    console = Console()
    console.print(table)
    console.print(
        f"seconds: {backend} load {ours['load']:.1f} run {ours['run']:.1f}; "
        f"hf load {theirs['load']:.1f} run {theirs['run']:.1f}"
    )


def equal(total: int, differ: int) -> str:
    return f"{total - differ}/{total}"


if __name__ == "__main__":
    raise SystemExit(main())
