"""Other places where the figures of a run may go: TensorBoard, Weights & Biases, MLflow.

``metrics.jsonl`` is the record of a run; these are copies for looking at. A tracker that fails
while a run is going (a server that is down) is dropped with one line and never stops the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from qwen2kit.config.freeze import to_tree
from qwen2kit.config.tree import LoggingConfig, RunConfig
from qwen2kit.errors import MissingExtra
from qwen2kit.train.metrics import Record, Sink

TENSORBOARD_DIR = "tensorboard"
_NAMES = {
    "step": {
        "loss": "train/loss",
        "lr": "train/lr",
        "grad_norm": "train/grad_norm",
        "tokens": "train/tokens",
        "tokens_per_second": "speed/tokens_per_second",
        "mfu": "speed/mfu",
        "seconds": "speed/seconds_per_step",
        "data_seconds": "speed/data_seconds_per_step",
        "memory_bytes": "speed/memory_bytes",
    },
    "eval": {"loss": "held_out/loss", "exact_match": "held_out/exact_match"},
    "rewind": {"rewinds": "train/rewinds"},
}


class Tracker(Sink, Protocol):
    """A sink that has to be closed."""

    def close(self) -> None:
        """Nothing more will come."""
        ...


def check_trackers(config: LoggingConfig) -> None:
    """Raise MissingExtra if the package of a tracker that the recipe asks for is absent."""
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb, "mlflow": config.mlflow}
    for package, value in wanted.items():
        if value and find_spec(package) is None:
            raise MissingExtra(package, package)


def open_trackers(
    config: RunConfig, run_dir: Path, step: int, note: Callable[[str], None]
) -> list[Tracker]:
    """The trackers of a run that goes on after ``step``."""
    makers: list[tuple[object, Callable[[], Tracker]]] = [
        (config.logging.tensorboard, lambda: TensorBoard(run_dir / TENSORBOARD_DIR, step)),
        (config.logging.wandb, lambda: WandB(config, run_dir)),
        (config.logging.mlflow, lambda: MLflow(config, run_dir)),
    ]
    return [_Careful(make, note) for wanted, make in makers if wanted]


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of a record under the names trackers show them by."""
    for key, name in _NAMES[record["event"]].items():
        value = record.get(key)
        if value is not None:
            yield name, float(value)


class TensorBoard:
    """Event files, written without TensorFlow or PyTorch.

    Args:
        directory: of the event files.
        step: what the run has done so far; later points of an earlier call are void.
    """

    def __init__(self, directory: Path, step: int) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(directory))
        self._begin(step + 1)

    def write(self, record: Record) -> None:
        """Add the points of one record."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if record["event"] == "rewind":
            self._begin(record["step"])
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record)]
        self._writer.add_event(
            Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
        )

    def close(self) -> None:
        self._writer.close()

    def _begin(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))


class WandB:
    """A run at Weights & Biases; the same one when training is resumed."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=config.logging.wandb,
            id=_identity(run_dir),
            name=run_dir.name,
            dir=str(run_dir),
            config=to_tree(config),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Log the points of one record."""
        self._run.log(dict(scalars(record)) | {"step": record["step"]})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of an MLflow experiment; the same one when training is resumed."""

    _TAG = "qwen2kit.run"

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = config.logging.mlflow
        assert name is not None
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        identity = _identity(run_dir)
        earlier = self._client.search_runs([experiment], f"tags.`{self._TAG}` = '{identity}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {self._TAG: identity}
        self._id = self._client.create_run(experiment, run_name=run_dir.name, tags=tags).info.run_id
        for key, value in _flat(to_tree(config)):
            self._client.log_param(self._id, key, value)

    def write(self, record: Record) -> None:
        """Log the points of one record."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [Metric(name, value, now, record["step"]) for name, value in scalars(record)]
        self._client.log_batch(self._id, metrics=points)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Careful:
    """A tracker whose failures are told once and cost nothing but the tracker."""

    def __init__(self, make: Callable[[], Tracker], note: Callable[[str], None]) -> None:
        self._note = note
        self._tracker: Tracker | None = None
        self._try(lambda: setattr(self, "_tracker", make()))

    def write(self, record: Record) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._try(lambda: tracker.write(record))

    def close(self) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._try(tracker.close)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._tracker = None
            reason = " ".join(str(error).split())[:200]
            self._note(f"warning: a tracker failed and is left out from now on: {reason}")


def _identity(run_dir: Path) -> str:
    return sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]


def _flat(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        elif value is not None:
            yield f"{path}{key}", str(value)
