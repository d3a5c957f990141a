"""The directory of one run outside lm-eval: its settings, its answers so far, its results.

``run.json`` and ``requests.jsonl`` are there from the beginning; ``samples.jsonl`` and then
``results.json`` appear at the end. A directory without results.json is continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from qwen2kit.backend.loading import LoadedModel
from qwen2kit.errors import ConfigError
from qwen2kit.partial_file import write_text_atomically
from qwen2kit_evals.provenance import model_provenance
from qwen2kit_evals.request_log import FILE as LOG_FILE
from qwen2kit_evals.request_log import RequestLog
from qwen2kit_evals.results import RUN_FILE, check_output, plain

SAMPLES_FILE, RESULTS_FILE = "samples.jsonl", "results.json"


class RunDirectory:
    """Where a run keeps its answers; use as a context manager.

    Args:
        path: new, empty, or of an interrupted run with the same settings.
        settings: everything that decides the answers (JSON values).

    Attributes:
        log: answers of the interrupted run, and where new ones go.

    Raises:
        ConfigError: ``path`` holds a finished run, one with other settings, or other files.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        wanted = plain(settings)
        check_output(path)
        before = path / RUN_FILE
        if before.is_file():
            _check_same(before, wanted)
        path.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        self.log = RequestLog(path / LOG_FILE, digest)
        write_text_atomically(before, json.dumps(wanted, indent=2) + "\n")

    def __enter__(self) -> Self:
        self.log.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.log.__exit__(*error)

    def finish(self, document: Mapping[str, Any], samples: Iterable[Mapping[str, Any]]) -> None:
        """Write samples, one a line, and the results; the run is finished then."""
        lines = (json.dumps(plain(sample), ensure_ascii=False) + "\n" for sample in samples)
        write_text_atomically(self.path / SAMPLES_FILE, "".join(lines))
        write_text_atomically(
            self.path / RESULTS_FILE, json.dumps(plain(document), indent=2) + "\n"
        )


def settings_of(kind: str, loaded: LoadedModel, **options: Any) -> dict[str, Any]:
    """Settings of a run of ``loaded``: what is measured, with which options, of which model."""
    return {"kind": kind, **options, "model": model_provenance(loaded)}


def _check_same(file: Path, wanted: Mapping[str, Any]) -> None:
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key))
    if changed:
        raise ConfigError(
            f"{file.parent} holds an unfinished run with another {', '.join(changed)}; "
            "repeat its options or name a new --output"
        )
