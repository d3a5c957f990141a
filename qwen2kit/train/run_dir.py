"""A run directory: where its parts are, what ``run.json`` says, how a run ended.

``run.json`` (status, frozen recipe, final figures), ``metrics.jsonl``, ``loss.png``,
``report.html``, ``start/`` (config.json and tokenizer that a resume needs), ``checkpoints/`` and,
once finished, ``model/`` in Hugging Face layout (or an adapter). If asked for: ``initial/`` (the
untrained model), ``profile/`` (traces), ``tensorboard/``, ``wandb/``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from qwen2kit.config.tree import RunConfig
from qwen2kit.errors import ConfigError
from qwen2kit.partial_file import sync_directory, write_text_atomically
from qwen2kit.spec.hf import from_hf_config, to_hf_config
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.train.setup import Origin, check_vocabulary
from qwen2kit.weights.hf_layout import read_json

SCHEMA_VERSION = 1
RUN_FILE, METRICS_FILE, CURVE_FILE = "run.json", "metrics.jsonl", "loss.png"
START_DIR, CHECKPOINT_DIR, INITIAL_DIR, MODEL_DIR = "start", "checkpoints", "initial", "model"
PROFILE_DIR, REPORT_FILE = "profile", "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_dir: where everything is.
        status: ``finished``, or ``stopped`` by a signal (then it can be resumed).
        signal: the signal's name if stopped.
        step, total_steps: optimizer steps done and planned.
        tokens: tokens processed over the whole run, padding excluded.
        skipped: steps left out because their loss was not finite or far above the recent ones.
        rewinds: how often the run went back to a checkpoint because of such a loss.
        loss: training loss of the last step.
        before, after: held-out figures (``loss``, ``exact_match``) before and after training.
        seconds: wall time of this call.
        reports: whether this process is the one to tell a person (process 0).
    """

    run_dir: Path
    status: str
    signal: str | None
    step: int
    total_steps: int
    tokens: int
    skipped: int
    rewinds: int
    loss: float | None
    before: dict[str, Any]
    after: dict[str, Any]
    seconds: float
    reports: bool = True

    @property
    def model_dir(self) -> Path:
        """The exported model (exists if the status is ``finished``)."""
        return self.run_dir / MODEL_DIR

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        values = asdict(self) | {"run_dir": str(self.run_dir), "model_dir": str(self.model_dir)}
        del values["reports"]
        return values

    @staticmethod
    def of_finished(run_dir: Path, document: Mapping[str, Any], *, reports: bool) -> RunResult:
        """The result that the ``run.json`` of a finished run holds."""
        names = {field.name for field in fields(RunResult)} - {"run_dir", "reports"}
        values = {name: document.get(name) for name in names}
        return RunResult(run_dir=run_dir, reports=reports, **values)  # type: ignore[arg-type]


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


def write_run(run_dir: Path, status: str, provenance: Mapping[str, Any], /, **values: Any) -> None:
    """Replace ``run.json``. Raises OSError."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "status": status,
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        **values,
        "provenance": provenance,
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomically(run_dir / RUN_FILE, text + "\n")


def fresh_directory(config: RunConfig) -> Path:
    """A new directory under ``config.output_dir``, named after the recipe and the time; runs that
    start in the same second get one each. Raises OSError."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path(config.output_dir).expanduser() / f"{config.name}-{stamp}"
    for number in count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("unreachable")


def is_fresh(run_dir: Path) -> bool:
    """Whether no run has got as far as ``run.json`` in ``run_dir``, and nothing else is there."""
    if not run_dir.exists():
        return True
    own = {START_DIR, _partial(run_dir / START_DIR).name}
    return run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= own


def write_origin(run_dir: Path, origin: Origin) -> None:
    """Store spec and tokenizer under ``start/``: complete or absent. Raises OSError."""
    directory = run_dir / START_DIR
    partial = _partial(directory)
    for leftover in (directory, partial):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    origin.tokenizer.save(partial)
    text = json.dumps(to_hf_config(origin.spec, dtype="float32"), indent=2)
    write_text_atomically(partial / "config.json", text + "\n")
    partial.replace(directory)
    sync_directory(run_dir)


def read_origin(run_dir: Path) -> Origin:
    """What `write_origin` stored.

    Raises:
        ConfigError: it is not there, or damaged.
    """
    directory = run_dir / START_DIR
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{directory} has no config.json: this run cannot be resumed (with several machines, "
            "the run directory must be on a file system that all of them share)"
        )
    spec = from_hf_config(read_json(path))
    tokenizer = Tokenizer.from_dir(directory)
    check_vocabulary(spec, tokenizer)
    return Origin(spec, tokenizer)


def _partial(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")
