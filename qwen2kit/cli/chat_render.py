"""An answer on the screen while it comes: Markdown over the full width, or plain text."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from qwen2kit.cli.output import write_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

_FENCE = re.compile(r" {0,3}(```+|~~~+)")


class Screen(Protocol):
    """Shows text piece by piece."""

    def write(self, piece: str) -> None:
        """More text."""
        ...

    def pause(self) -> None:
        """Finish what is shown so far: something else will be printed."""
        ...


class PlainScreen:
    """Pieces as they are, to stdout."""

    def __init__(self) -> None:
        self._written = False

    def write(self, piece: str) -> None:
        """More text."""
        write_text(piece)
        self._written = True

    def pause(self) -> None:
        """End the line, if there is one."""
        if self._written:
            self.write("\n")
            self._written = False


class MarkdownScreen:
    """Finished blocks are printed for good; the last one is drawn again as it grows.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._text = ""
        self._blank = False

    def write(self, piece: str) -> None:
        """More text."""
        self._text += piece
        while cut := block_end(self._text):
            self._stop()
            self._print(self._text[:cut])
            self._text = self._text[cut:].lstrip("\n")
        if self._text.strip():
            self._show()

    def pause(self) -> None:
        """Print what is left."""
        self._stop()
        if self._text.strip():
            self._print(self._text)
        self._text = ""
        self._blank = False

    def _show(self) -> None:
        if self._live is None:
            from rich.live import Live

            if self._blank:
                self._console.print()
                self._blank = False
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop"
            )
            self._live.start()
        self._live.update(_Block(self._text, tail=True), refresh=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, block: str) -> None:
        if self._blank:
            self._console.print()
        self._console.print(_Block(block), end="")
        self._blank = True


class _Block:
    """Markdown without empty lines at its ends.

    Args:
        text: one block.
        tail: show only the end of what is taller than the screen.
    """

    def __init__(self, text: str, *, tail: bool = False) -> None:
        self._text = text
        self._tail = tail

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markdown import Markdown
        from rich.segment import Segment

        lines = console.render_lines(Markdown(self._text), options, pad=False)
        full = [bool("".join(part.text for part in line).strip()) for line in lines]
        if any(full):
            lines = lines[full.index(True) : len(full) - full[::-1].index(True)]
        if self._tail:
            lines = lines[-max(console.height - 2, 1) :]
        for line in lines:
            yield from line
            yield Segment.line()


def block_end(text: str) -> int:
    """Length of the first block of Markdown ``text`` if it is finished, else 0.

    A block ends at an empty line, outside of code fences, after which a line begins that does not
    continue it (indented text does).
    """
    fence = ""
    at = 0
    empty = False
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n") and not line.strip():
            break  # may become indentation
        if empty and not fence and line.strip() and not line[0].isspace():
            return at
        if mark := _FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif line.strip().startswith(fence) and set(line.strip()) == {fence[0]}:
                fence = ""
        empty = not line.strip()
        at += len(line)
    return 0


def open_screen(*, markdown: bool) -> Screen:
    """Markdown if it is wanted and stdout is a terminal, else plain text."""
    if not (markdown and sys.stdout.isatty()):
        return PlainScreen()
    from rich.console import Console

    return MarkdownScreen(Console(highlight=False))


@contextmanager
def interruptible() -> Iterator[list[bool]]:
    """What it yields is filled when Ctrl-C is pressed, so that a step of the model can be
    finished first; pressed again, it interrupts at once."""
    import signal

    pressed: list[bool] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: nobody can press anything here
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
