"""How commands talk: tables and progress to people on stderr, one JSON document on stdout.

Rich is imported inside the functions so that ``--help`` stays fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """The console for people (stderr), so that stdout stays machine-readable."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=False)


def show_notes(notes: Iterable[str]) -> None:
    """What is worth knowing (`LoadedModel.notes`, for one), a line each on stderr."""
    screen = console()
    for note in notes:
        screen.print(f"note: {note}", markup=False, soft_wrap=True)


@contextmanager
def progress(label: str) -> Iterator[Callable[[str], None]]:
    """A status line that counts; call what it yields with the name of each thing being done."""
    with console().status(label) as status:
        count = 0

        def step(name: str) -> None:
            nonlocal count
            count += 1
            status.update(f"{label} {count}: {name}")

        yield step


def emit_json(document: Any) -> None:
    """Write one JSON document to stdout; letters that its encoding lacks are escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    if _shown(text) != text:
        text = json.dumps(document, indent=2, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_text(text: str) -> None:
    """Write text to stdout at once; letters that its encoding lacks become question marks."""
    sys.stdout.write(_shown(text))
    sys.stdout.flush()


def _shown(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


def fail(message: str, exit_code: int) -> None:
    """Write one error line and leave with ``exit_code``."""
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    raise SystemExit(exit_code)
