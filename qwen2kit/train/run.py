"""One training run from recipe to exported model: start it, or resume it.

``run_dir`` holds ``run.json`` (status, frozen recipe, final figures), ``metrics.jsonl``,
``loss.png``, ``start/`` (config.json and tokenizer that a resume needs), ``checkpoints/``,
``initial/`` (if asked for) and, once finished, ``model/`` in Hugging Face layout.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from qwen2kit.config.freeze import differences, freeze, to_tree
from qwen2kit.config.load import load_recipe, override, parse
from qwen2kit.config.tree import RunConfig
from qwen2kit.errors import ConfigError, Qwen2KitError, TrainingError
from qwen2kit.spec.hf import from_hf_config, to_hf_config
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.train.curve import plot_loss
from qwen2kit.train.evaluate import Evaluator
from qwen2kit.train.export import export_model
from qwen2kit.train.live import LiveTable
from qwen2kit.train.metrics import JsonlSink, Sinks, read_records
from qwen2kit.train.session import Session
from qwen2kit.train.setup import (
    Origin,
    build_data,
    build_model,
    build_origin,
    check_limits,
    initial_checkpoint,
    total_steps,
    training_backend,
)
from qwen2kit.train.signals import StopRequest
from qwen2kit.weights.safetensors_write import write_text_atomically

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_VERSION = 1
RUN_FILE, METRICS_FILE, CURVE_FILE = "run.json", "metrics.jsonl", "loss.png"
START_DIR, CHECKPOINT_DIR, INITIAL_DIR, MODEL_DIR = "start", "checkpoints", "initial", "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_dir: where everything is.
        status: ``finished``, or ``stopped`` by a signal (then it can be resumed).
        signal: the signal's name if stopped.
        step, total_steps: optimizer steps done and planned.
        tokens: tokens processed over the whole run, padding excluded.
        skipped: steps left out because of a non-finite loss.
        loss: training loss of the last step.
        before, after: held-out figures (``loss``, ``exact_match``) before and after training.
        seconds: wall time of this call.
    """

    run_dir: Path
    status: str
    signal: str | None
    step: int
    total_steps: int
    tokens: int
    skipped: int
    loss: float | None
    before: dict[str, Any]
    after: dict[str, Any]
    seconds: float

    @property
    def model_dir(self) -> Path:
        """The exported model (exists if the status is ``finished``)."""
        return self.run_dir / MODEL_DIR

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return asdict(self) | {"run_dir": str(self.run_dir), "model_dir": str(self.model_dir)}


def start(
    config: RunConfig, *, run_dir: Path | None = None, console: Console | None = None
) -> RunResult:
    """Train as ``config`` says in a new run directory.

    Args:
        run_dir: an absent or empty directory; None makes one under ``config.output_dir``.
        console: where progress is shown; None is silent.

    Raises:
        Qwen2KitError: of the kind that says what is wrong; ``run.json`` then says ``failed``.
    """
    directory = run_dir or _fresh_directory(config)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is not empty; choose another --run-dir or use --resume")
    training_backend(config)
    origin = build_origin(config)
    directory.mkdir(parents=True, exist_ok=True)
    _write_origin(directory / START_DIR, origin)
    return _Runner(config, directory, origin, console).run()


def resume(
    run_dir: Path,
    *,
    config: RunConfig | None = None,
    allow_changes: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Continue a run after its newest intact checkpoint.

    Args:
        config: the recipe to go on with; None takes the run's own.
        allow_changes: accept a recipe that differs from the run's.

    Raises:
        ConfigError: not a run directory, or the recipe differs (the message lists the fields).
        TrainingError: the run is finished, or no checkpoint is intact.
    """
    stored = read_run(run_dir)
    if stored["status"] == "finished" and not allow_changes:
        raise TrainingError(f"{run_dir} is finished after {stored['step']} steps: nothing to do")
    old = stored["provenance"]["config"]
    config = config or parse(old, source=f"{run_dir}/{RUN_FILE}")
    changed = differences(old, to_tree(config))
    if changed and not allow_changes:
        raise ConfigError(
            f"the recipe differs from that of {run_dir} in {', '.join(changed)}; drop the changes "
            "or pass --allow-changes"
        )
    origin = _read_origin(run_dir / START_DIR, config)
    return _Runner(config, run_dir, origin, console).run(resuming=True)


def changed_recipe(run_dir: Path, recipe: str | None, overrides: Sequence[str]) -> RunConfig | None:
    """The recipe a resume asks for: a recipe or the run's own, with overrides; None for neither.

    Raises:
        ConfigError: as in `load_recipe`.
    """
    if recipe is not None:
        return load_recipe(recipe, overrides)
    if not overrides:
        return None
    tree = read_run(run_dir)["provenance"]["config"]
    return parse(override(tree, overrides), source=f"{run_dir}/{RUN_FILE}")


def read_run(run_dir: Path) -> dict[str, Any]:
    """The ``run.json`` of a run directory.

    Raises:
        ConfigError: there is none, or it is damaged or from another version.
    """
    path = run_dir / RUN_FILE
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it has no {RUN_FILE}")
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = document["schema_version"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged") from None
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{path} has schema version {version}, not {SCHEMA_VERSION}")
    return document


class _Runner:
    """Carries one run through its phases and keeps ``run.json`` up to date."""

    def __init__(
        self, config: RunConfig, run_dir: Path, origin: Origin, console: Console | None
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.origin = origin
        self.console = console
        self.started = perf_counter()
        self.provenance: dict[str, Any] = {}

    def run(self, *, resuming: bool = False) -> RunResult:
        backend, model = build_model(self.config, self.origin.spec)
        self.provenance = freeze(self.config, backend.versions())
        self._write("running")
        try:
            data = build_data(self.config, self.origin.tokenizer, self._note)
            total = total_steps(self.config, data.train)
            screen = LiveTable(self.console, total, self.config.name) if self.console else None
            jsonl = JsonlSink(self.run_dir / METRICS_FILE)
            session = Session(
                self.config,
                self.run_dir / CHECKPOINT_DIR,
                model,
                data,
                Evaluator(self.config, self.origin.tokenizer, data.held_out),
                total,
                Sinks([jsonl] if screen is None else [jsonl, screen]),
            )
            restored = resuming and session.restore(self._note)
            jsonl.keep_upto(session.progress.step if restored else -1)
            if not restored:
                session.begin(initial_checkpoint(self.config.model))
                if self.config.checkpoint.initial:
                    self._export(session, INITIAL_DIR)
                session.evaluate(session.progress)
            return self._train(session, screen)
        except Qwen2KitError as error:
            with suppress(OSError):  # the disk may be full, which is then the error to report
                self._write("failed", error=str(error))
            raise

    def _train(self, session: Session, screen: LiveTable | None) -> RunResult:
        with StopRequest() as stop:
            if screen is None:
                session.train(stop)
            else:
                with screen:
                    session.train(stop)
        finished = session.progress.step == session.total
        if finished:
            session.evaluate(session.progress)
            self._export(session, MODEL_DIR)
        if self.config.logging.plot:
            records = [*read_records(self.run_dir / METRICS_FILE)]
            plot_loss(self.run_dir / CURVE_FILE, records, self.config.name)
        result = self._result(session, finished, stop.requested)
        values = result.to_json()
        self._write(values.pop("status"), **values)
        return result

    def _result(self, session: Session, finished: bool, signal: str | None) -> RunResult:
        progress = session.progress
        return RunResult(
            run_dir=self.run_dir,
            status="finished" if finished else "stopped",
            signal=None if finished else signal,
            step=progress.step,
            total_steps=session.total,
            tokens=progress.tokens,
            skipped=progress.skipped,
            loss=progress.last_loss,
            before=session.held.before,
            after=session.held.latest if finished else {},
            seconds=round(perf_counter() - self.started, 3),
        )

    def _export(self, session: Session, name: str) -> None:
        export_model(
            session.model,
            self.origin.tokenizer,
            self.run_dir / name,
            dtype=self.config.export_dtype,
            chat=self.config.task == "sft",
        )

    def _write(self, status: str, **values: Any) -> None:
        document = {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            **values,
            "provenance": self.provenance,
        }
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        write_text_atomically(self.run_dir / RUN_FILE, text + "\n")

    def _note(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, markup=False, soft_wrap=True)


def _fresh_directory(config: RunConfig) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path(config.output_dir).expanduser() / f"{config.name}-{stamp}"
    candidates = [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def _write_origin(directory: Path, origin: Origin) -> None:
    directory.mkdir()
    origin.tokenizer.save(directory)
    text = json.dumps(to_hf_config(origin.spec, dtype="float32"), indent=2)
    write_text_atomically(directory / "config.json", text + "\n")


def _read_origin(directory: Path, config: RunConfig) -> Origin:
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{directory} has no config.json: this run cannot be resumed")
    spec = from_hf_config(json.loads(path.read_text(encoding="utf-8")))
    tokenizer = Tokenizer.from_dir(directory)
    check_limits(config, spec, tokenizer)
    return Origin(spec, tokenizer)
