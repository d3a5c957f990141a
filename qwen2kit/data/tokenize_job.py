"""``qwen2kit data tokenize``: a directory of shards, made by several processes, resumable.

The result depends on the input, the tokenizer and the shard size only: not on the number of
processes, nor on how often the work was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from qwen2kit.config.data_tree import FileData, is_chat
from qwen2kit.data.shard_format import (
    INDEX_FILE,
    JOB_FILE,
    TOKENIZER_DIR,
    ShardIndex,
    ShardInfo,
    Task,
    check_sizes,
    read_index,
    token_dtype,
    tokenizer_digest,
    write_index,
)
from qwen2kit.data.tokenize_worker import Shared, Work, read_finished, run_worker
from qwen2kit.data.work_units import Unit, plan_units
from qwen2kit.directory_lock import locked
from qwen2kit.errors import DataError
from qwen2kit.partial_file import SUFFIX, write_text_atomically
from qwen2kit.tokenizer.bpe import Tokenizer

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeProgress:
    """How far the work is.

    Attributes:
        documents, tokens: made by this call.
        bytes: input bytes of the shards finished, earlier calls included.
        total_bytes: input bytes of all.
        shards, total_shards: finished (earlier calls included), and all.
    """

    documents: int
    tokens: int
    bytes: int
    total_bytes: int
    shards: int
    total_shards: int


def tokenize(
    data: FileData,
    tokenizer: Tokenizer,
    task: Task,
    directory: Path,
    *,
    workers: int,
    shard_bytes: int,
    progress: Callable[[TokenizeProgress], None],
) -> ShardIndex:
    """Write ``data`` as token shards to ``directory``, or go on where an earlier call stopped.

    Args:
        task: ``pretrain`` makes documents, ``sft`` conversations with their masks.
        workers: processes.
        shard_bytes: input bytes per shard.
        progress: called a few times per second.

    Raises:
        DataError: the input cannot be read, the directory belongs to other work or is being
            written by another process, a worker died, or the disk is full (what is finished is
            kept).
    """
    if task == "sft" and not is_chat(data):
        raise DataError("task sft needs conversations: choose a data.format other than text")
    job: dict[str, Any] = {
        "task": task,
        "tokenizer": tokenizer_digest(tokenizer, task),
        "data": _identity(data),
        "shard_bytes": shard_bytes,
    }
    units = plan_units(data, shard_bytes)
    inputs = sha256("".join(unit.digest() for unit in units).encode()).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    taken = DataError(f"{directory} is being written by another process; wait for it")
    with locked(directory, taken):
        if _is_finished(directory, job, inputs):
            return _clean(directory, read_index(directory))
        _begin(directory, job, tokenizer)
        dtype = token_dtype(tokenizer.vocab_size)
        _work(directory, data, task, units, dtype, workers, progress)
        index = ShardIndex(
            task=task,
            dtype=dtype,
            tokenizer=job["tokenizer"],
            made_from={"data": job["data"], "shard_bytes": shard_bytes, "inputs": inputs},
            shards=tuple(_finished(directory, *unit) for unit in enumerate(units)),
        )
        if index.total("documents") == 0:
            raise DataError("the data holds no document; check data.paths and data.format")
        check_sizes(directory, index)
        write_index(directory, index)
        return _clean(directory, index)


def _identity(data: FileData) -> dict[str, Any]:
    """The recipe node as JSON, without what does not change a document."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(data)))
    return {k: v for k, v in values.items() if k not in ("stream", "shuffle_rows")}


def _is_finished(directory: Path, job: dict[str, Any], inputs: str) -> bool:
    """Whether all is done already. Raises DataError if the directory belongs to other work."""
    if (directory / INDEX_FILE).is_file():
        index = read_index(directory)
        begun = {"task": index.task, "tokenizer": index.tokenizer, **index.made_from}
        _refuse_other(directory, begun, job | {"inputs": inputs})
        return True
    if (directory / JOB_FILE).is_file():
        try:
            begun = json.loads((directory / JOB_FILE).read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{directory / JOB_FILE} is damaged; remove {directory}") from None
        _refuse_other(directory, begun, job)
    elif not all(name.endswith(SUFFIX) for name in os.listdir(directory)):
        raise DataError(f"{directory} is not empty and holds no token shards; choose another --out")
    return False


def _refuse_other(directory: Path, begun: dict[str, Any], job: dict[str, Any]) -> None:
    changed = sorted(key for key in job if begun.get(key) != job[key])
    if changed:
        raise DataError(
            f"{directory} was begun with other {', '.join(changed)}; undo the change or choose "
            "another --out"
        )


def _begin(directory: Path, job: dict[str, Any], tokenizer: Tokenizer) -> None:
    _remove_partials(directory)
    text = json.dumps(job, indent=1, ensure_ascii=False)
    write_text_atomically(directory / JOB_FILE, text + "\n")
    tokenizer.save(directory / TOKENIZER_DIR)


def _remove_partials(directory: Path) -> None:
    for path in directory.glob(f".*{SUFFIX}"):
        path.unlink(missing_ok=True)


def _clean(directory: Path, index: ShardIndex) -> ShardIndex:
    """Remove what only unfinished work needs, and shards of an earlier state of the input."""
    names = {shard.name for shard in index.shards}
    for path in directory.glob("[0-9]*.*"):
        if path.suffix == ".json" or path.stem not in names:
            path.unlink()
    (directory / JOB_FILE).unlink(missing_ok=True)
    return index


def _finished(directory: Path, number: int, unit: Unit) -> ShardInfo:
    info = read_finished(directory, number, unit)
    if info is None:
        raise DataError(
            f"{unit.parts[0]} or a file after it changed while it was read; run the same command "
            "again to read it anew"
        )
    return info


def _work(
    directory: Path,
    data: FileData,
    task: Task,
    units: list[Unit],
    dtype: str,
    workers: int,
    progress: Callable[[TokenizeProgress], None],
) -> None:
    pending = [n for n in range(len(units)) if read_finished(directory, n, units[n]) is None]
    work = Work(
        directory=directory,
        data=data,
        task=task,
        units=tuple(units),
        pending=tuple(pending),
        dtype=dtype,
    )
    context = get_context("spawn")
    shared = Shared(context.Value("q", 0), context.Array("q", 4), context.SimpleQueue())
    total = sum(unit.size for unit in units)
    before = total - sum(units[number].size for number in pending)

    def report() -> None:
        documents, tokens, size, shards = shared.done[:]
        progress(
            TokenizeProgress(
                documents=documents,
                tokens=tokens,
                bytes=before + size,
                total_bytes=total,
                shards=len(units) - len(pending) + shards,
                total_shards=len(units),
            )
        )

    processes = [
        context.Process(target=run_worker, args=(work, shared), daemon=True)
        for _ in range(min(workers, len(pending)))
    ]
    try:
        for process in processes:
            process.start()
        _watch(processes, shared, directory, report)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()
        _remove_partials(directory)


def _watch(
    processes: Sequence[BaseProcess], shared: Shared, directory: Path, report: Callable[[], None]
) -> None:
    running = list(processes)
    while running:
        ended = wait([process.sentinel for process in running], timeout=_POLL_SECONDS)
        report()
        for process in [p for p in running if p.sentinel in ended]:
            process.join()
            running.remove(process)
            if process.exitcode != 0:
                raise _failure(process, shared, directory)


def _failure(process: BaseProcess, shared: Shared, directory: Path) -> DataError:
    rest = f"finished shards are kept in {directory}: run the same command again to go on"
    if not shared.errors.empty():
        message, _ = shared.errors.get()
        return DataError(f"{message}; {rest}")
    return DataError(
        f"a tokenising process died (exit code {process.exitcode}; -9 is often too little memory, "
        f"then lower --workers); {rest}"
    )
