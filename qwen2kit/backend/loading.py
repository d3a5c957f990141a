"""From what the user typed to a model that runs: locate, open, compile, load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen2kit.adapters.merge import open_model
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import Backend, CompiledModel
from qwen2kit.backend.registry import get
from qwen2kit.backend.values import LoadReport, TokenEvent, TokenIds
from qwen2kit.engine.generate import generate
from qwen2kit.generate.sampling import Sampling
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to score and generate, with the files it came from and the plan it runs by."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    backend: Backend
    model: CompiledModel
    report: LoadReport
    plan: ExecutionPlan = field(default_factory=ExecutionPlan)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the weights were read and are held."""
        return self.checkpoint.notes + self.report.notes

    def sampling(self, **overrides: object) -> Sampling:
        """The checkpoint's generation defaults (stop ids included), with ``overrides`` applied.

        ``temperature=0`` with no other override is greedy decoding.
        """
        defaults = self.checkpoint.generation
        values: dict[str, object] = {
            "stop_token_ids": defaults.stop_token_ids,
            "temperature": defaults.temperature,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "repetition_penalty": defaults.repetition_penalty,
            "vocab_limit": min(self.tokenizer.vocab_size, self.checkpoint.spec.vocab_size),
        }
        values |= {key: value for key, value in overrides.items() if value is not None}
        return Sampling(**values)  # type: ignore[arg-type]

    def generate(self, prompts: Sequence[TokenIds], sampling: Sampling) -> Iterator[TokenEvent]:
        """Continue every prompt; see `qwen2kit.engine.generate.generate`."""
        return generate(self.model, prompts, sampling)


def load_model(
    model: str | Path,
    *,
    backend: str = "auto",
    plan: ExecutionPlan | None = None,
    adapter: str | Path | None = None,
) -> LoadedModel:
    """Load ``model`` (directory, GGUF file, run directory or hub id) on ``backend``.

    ``adapter`` is a LoRA adapter of it (PEFT or mlx-lm layout, or the run that trained it); an
    adapter may also stand in the place of ``model`` if it names its base.

    Raises:
        Qwen2KitError: of the kind that says what is wrong (weights, config, backend, extra).
    """
    chosen = get(backend)
    checkpoint = open_model(str(model), None if adapter is None else str(adapter))
    tokenizer = checkpoint.tokenizer()
    plan = plan or ExecutionPlan()
    compiled = chosen.compile(checkpoint.spec, plan)
    report = compiled.load(checkpoint.weights)
    return LoadedModel(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        backend=chosen,
        model=compiled,
        report=report,
        plan=plan,
    )
