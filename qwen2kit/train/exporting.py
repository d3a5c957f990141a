"""What a run hands over: the model it trains, or the adapter of its base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwen2kit.adapters.export import export_adapter
from qwen2kit.backend.processes import Processes
from qwen2kit.backend.protocol import AdapterModel
from qwen2kit.config.tree import AdapterConfig, RunConfig
from qwen2kit.errors import TrainingError
from qwen2kit.partial_file import reason_of
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.train.agreement import together
from qwen2kit.train.export import export_model
from qwen2kit.train.session import Session


def export_trained(
    session: Session,
    config: RunConfig,
    tokenizer: Tokenizer,
    path: Path,
    *,
    processes: Processes,
    go_on: Callable[[], None],
) -> None:
    """Write the model of ``session`` as the directory ``path``, which appears only when complete
    (collective).

    Args:
        config: the recipe of the whole run.
        go_on: called on the way, on all processes; what it raises ends the export.

    Raises:
        TrainingError: the disk is full or not writable.
        PeerError: process 0 failed.
    """
    try:
        if config.adapter is not None:
            go_on()
            _export_adapter(session, config, config.adapter, path, processes)
            return
        export_model(
            session.model,
            tokenizer,
            path,
            dtype=config.export_dtype,
            chat=config.task == "sft",
            processes=processes,
            go_on=go_on,
        )
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {reason_of(error)}; when that is mended, go "
            "on with --resume or --auto-resume: checkpoints are kept"
        ) from error


def _export_adapter(
    session: Session, config: RunConfig, adapter: AdapterConfig, path: Path, processes: Processes
) -> None:
    base, model = config.model.checkpoint, session.model
    assert base is not None
    assert isinstance(model, AdapterModel)
    factors = list(model.export_adapter())

    def write() -> None:
        if processes.rank == 0:
            export_adapter(
                path,
                adapter,
                factors,
                base_model=base,
                dtype=config.export_dtype,
                base_mark=session.base_mark,
            )

    together(processes, write)
