"""The steps of ``qwen2kit demo`` as functions over library calls: convert, chat, exact match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.backend.plan import ExecutionPlan

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit.data.embedded import Question

Note = Callable[[str], None]
BITS = 4
GROUP_SIZE = 64
BEFORE, AFTER = "untrained", "trained"


def convert_and_verify(
    model_dir: Path, out: Path, backends: Sequence[str], note: Note
) -> list[dict[str, Any]]:
    """Write ``out/mlx`` and ``out/mlx-4bit`` and prove them against the original.

    Raises:
        ParityError: the converted model does not compute what the original does.
    """
    from qwen2kit.weights.checkpoint import open_checkpoint
    from qwen2kit.weights.convert import convert
    from qwen2kit.weights.verify import verify

    source = open_checkpoint(model_dir)
    reports = []
    for name, bits in (("mlx", None), (f"mlx-{BITS}bit", BITS)):
        note(f"converting to {name} and verifying")
        report = convert(source, out / name, to="mlx", quantize_bits=bits, group_size=GROUP_SIZE)
        verify(source, open_checkpoint(out / name), backends)
        reports.append(report.to_dict() | {"verified_on": list(backends)})
    return reports


def models_to_score(run_dir: Path, backends: Sequence[str]) -> list[tuple[str, str, Path]]:
    """``(label, backend, directory)`` of every model that is scored, untrained ones first."""
    pairs = [
        (label, backend, run_dir / folder)
        for label, folder in ((BEFORE, "initial"), (AFTER, "model"))
        for backend in backends
    ]
    if "mlx" in backends:
        pairs.append((f"{AFTER}, {BITS}-bit", "mlx", run_dir / f"mlx-{BITS}bit"))
    return pairs


def load(directory: Path, backend: str) -> LoadedModel:
    """``directory`` on ``backend`` in float32."""
    from qwen2kit.backend.loading import load_model

    return load_model(directory, backend=backend, plan=ExecutionPlan(dtype="float32"))


def ask(loaded: LoadedModel, question: Question) -> dict[str, Any]:
    """One chat turn with a held-out question."""
    from qwen2kit.chat.session import ChatSession

    session = ChatSession(loaded, max_new_tokens=32, temperature=0.0)
    list(session.send(question.messages[-1]["content"]))
    assert session.last is not None
    return {
        "question": question.messages[-1]["content"],
        "expected": question.answer,
        "answer": session.last.text,
        "finish_reason": session.last.finish_reason,
    }


def score(loaded: LoadedModel, questions: Sequence[Question]) -> float:
    """Share of held-out questions answered exactly."""
    from qwen2kit.train.exact_match import exact_match

    return exact_match(loaded.model, loaded.tokenizer, questions).score
