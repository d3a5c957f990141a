"""`Sandbox`: run a program's text and say how it ended, whatever the program does."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen2kit.errors import BackendError
from qwen2kit_evals.sandbox.limits import Layer, Limits, Outcome

_PACKAGES = Path(__file__).parents[2]
_START = (
    "import sys; sys.path.insert(0, {0!r}); from qwen2kit_evals.sandbox.launch import main; main()"
)
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_GRACE_SECONDS = 30.0
_DRAIN_SECONDS = 2.0
_CHUNK = 1 << 16


class SandboxError(BackendError):
    """A program could not be confined as ordered, so it was not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """Runs Python programs, each in a process of its own; may be used from several threads.

    Attributes:
        layers: how programs are cut off; one that fails stops the program from being run.
            ``namespaces``: file system, processes, network and IPC of their own (Linux); without
            ``user`` also user ids of their own.
            ``landlock``, ``seatbelt``: access to files by rule (Linux, macOS).
            ``seccomp``: no sockets, no system calls that reach other processes (Linux).
            ``user``: a user id that owns nothing (needs root).
        limits: upper bounds for each program.
    """

    layers: tuple[Layer, ...]
    limits: Limits = field(default_factory=Limits)

    def run(self, program: str) -> Outcome:
        """Execute ``program`` to its end, its time-out or its crash; nothing of it is left.

        It sees the standard library and installed packages, an empty environment, an empty
        temporary directory, and no input. ``__name__`` is ``program``.

        Raises:
            SandboxError: a layer could not be put in place.
        """
        with self._work_directory() as work:
            return _Execution(self._order(program, work), self.limits).outcome()

    @contextlib.contextmanager
    def _work_directory(self) -> Iterator[str]:
        if "namespaces" in self.layers:  # has one in memory
            yield ""
            return
        with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as work:
            yield os.path.realpath(work)

    def _order(self, program: str, work: str) -> dict[str, Any]:
        return {
            "program": program,
            "work": work,
            "layers": self.layers,
            "limits": asdict(self.limits),
            "parent": os.getpid(),
            "readable": _readable(),
            "import_path": _import_path(),
            "environment": _ENVIRONMENT,
        }


class _Execution:
    """One launcher process, from its start until nothing of its group is left."""

    def __init__(self, order: dict[str, Any], limits: Limits) -> None:
        self._limits = limits
        self._output = bytearray()
        self._report = bytearray()
        reader, writer = os.pipe()
        self._reader = reader
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", _START.format(str(_PACKAGES)),
                 str(writer)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=(writer,), env={}, cwd="/", start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(writer)
        self._order = json.dumps(order).encode()

    def outcome(self) -> Outcome:
        """Wait for the end; raises `SandboxError` if the launcher brought no report."""
        assert self._process.stdin
        assert self._process.stdout
        output = self._process.stdout.fileno()
        try:
            with contextlib.suppress(BrokenPipeError), self._process.stdin as order:
                order.write(self._order)
            self._read(output, self._limits.seconds + _GRACE_SECONDS, until=self._reader)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            survivors = not self._read(output, _DRAIN_SECONDS, until=output)
            os.close(self._reader)
            self._process.stdout.close()
        return self._read_report(survivors)

    def _read(self, output: int, seconds: float, *, until: int) -> bool:
        """Take in output and report until ``until`` is at its end; whether it came to that."""
        deadline = time.monotonic() + seconds
        targets = {output: self._output, self._reader: self._report}
        with selectors.DefaultSelector() as selector:
            for source in targets:
                selector.register(source, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, _CHUNK)
                    if not chunk:
                        selector.unregister(key.fd)
                        if key.fd == until:
                            return True
                    targets[key.fd] += chunk
                    del self._output[self._limits.output_bytes :]
        return False

    def _read_report(self, survivors: bool) -> Outcome:
        output = self._output.decode(errors="replace")
        try:
            report = json.loads(self._report)
        except ValueError as error:
            last = (output.strip().splitlines() or ["it was killed"])[-1]
            raise SandboxError(f"the sandbox's launcher failed: {last}") from error
        if "unconfined" in report:
            raise SandboxError(f"a program could not be isolated: {report['unconfined']}")
        return Outcome(**report, output=output, survivors=survivors)


def _import_path() -> list[str]:
    """Standard library and installed packages, without what ``.pth`` files add."""
    zipped = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    kept = [path for path in sys.path if path.endswith(("lib-dynload", zipped))]
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return list(dict.fromkeys([*(sysconfig.get_path(name) for name in names), *kept]))


def _readable() -> list[str]:
    return ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", *_import_path()]
