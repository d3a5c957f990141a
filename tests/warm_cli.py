"""Processes of ``python -m qwen2kit`` forked from one that has imported others' packages only.

Importing torch costs each process seconds, the rest half a second. What comes after is as in a
fresh interpreter: our own modules are imported, the process ends as an interpreter does, its output
is what reached the descriptors.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final, NoReturn

_PRELOADED = (
    "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.pipelining",
    "fastapi", "httpx", "jinja2", "matplotlib.backends.backend_agg", "matplotlib.figure", "numpy",
    "pandas", "pyarrow", "pydantic", "requests", "rich.console", "tokenizers", "typer", "uvicorn",
)  # fmt: skip
# Variables that no module reads while the ones above are being imported.
_LATE = {
    "PYTEST_CURRENT_TEST", "COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "HF_DATASETS_CACHE",
}  # fmt: skip
_START_SECONDS = 300.0
_NUMBER: Final = struct.Struct("!i")


class WarmStart:
    """The process that is forked; it ends with the one that made it.

    Args:
        environment: variables it has imported its modules with.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._early = _early(environment)
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),), env=dict(environment),
            )  # fmt: skip

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether a process of ``environment`` would have imported the same."""
        return _early(environment) == self._early

    def run(
        self,
        arguments: Sequence[str],
        *,
        stdin: bytes,
        cwd: Path,
        environment: Mapping[str, str],
        timeout: float,
    ) -> tuple[int, bytes, bytes]:
        """``python -m qwen2kit *arguments``; exit code as of `subprocess`, stdout, stderr.

        Raises:
            subprocess.TimeoutExpired: it was killed after ``timeout`` seconds.
        """
        with self._lock:
            self._socket.settimeout(_START_SECONDS)
            pipes = [os.pipe() for _ in range(3)]
            theirs = (pipes[0][0], pipes[1][1], pipes[2][1])
            order = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(environment)}
            data = json.dumps(order).encode()
            socket.send_fds(self._socket, [_NUMBER.pack(len(data))], theirs)
            self._socket.sendall(data)
            for descriptor in theirs:
                os.close(descriptor)
            threads = _Exchange(pipes[0][1], stdin), _Exchange(pipes[1][0]), _Exchange(pipes[2][0])
            process = self._number()
            self._socket.settimeout(timeout)
            end = time.monotonic() + timeout
            try:
                code = self._number()
            except TimeoutError:
                os.kill(process, signal.SIGKILL)
                self._socket.settimeout(None)
                self._number()
                raise subprocess.TimeoutExpired(list(arguments), timeout) from None
            for thread in threads:  # a process that it left behind may hold a pipe open
                thread.join(max(0.0, end - time.monotonic()))
                if thread.is_alive():
                    raise subprocess.TimeoutExpired(list(arguments), timeout)
            return code, threads[1].data, threads[2].data

    def _number(self) -> int:
        """The next number that the server says."""
        data = b""
        while len(data) < _NUMBER.size:
            part = self._socket.recv(_NUMBER.size - len(data))
            if not part:
                assert self._server.stderr is not None
                raise RuntimeError(f"no process to fork: {self._server.stderr.read().decode()}")
            data += part
        return int(_NUMBER.unpack(data)[0])


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _LATE}


class _Exchange(threading.Thread):
    """Writes to a pipe, or reads all that comes out of it."""

    def __init__(self, descriptor: int, to_write: bytes | None = None) -> None:
        super().__init__(daemon=True)
        self.data = b""
        self._writing = to_write is not None
        self._to_write = to_write or b""
        self._file: IO[bytes] = os.fdopen(descriptor, "wb" if self._writing else "rb")
        self.start()

    def run(self) -> None:
        with contextlib.suppress(BrokenPipeError), self._file:
            if self._writing:
                self._file.write(self._to_write)
            else:
                self.data = self._file.read()


def _serve(asked: socket.socket) -> dict[str, Any] | None:
    """Fork for every order; returns the order in a fork, and None at the end."""
    while True:
        header, descriptors, _, _ = socket.recv_fds(asked, _NUMBER.size, 3)
        if not header:
            return None
        data, size = b"", _NUMBER.unpack(header)[0]
        while len(data) < size:
            data += asked.recv(size - len(data))
        child = os.fork()
        if not child:
            asked.close()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            order: dict[str, Any] = json.loads(data)
            return order
        for descriptor in descriptors:
            os.close(descriptor)
        asked.sendall(_NUMBER.pack(child))
        _, status = os.waitpid(child, 0)
        asked.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(status)))


def _become(order: Mapping[str, Any]) -> NoReturn:
    """Be what ``python -m qwen2kit`` with the order's arguments would be.

    It ends as an interpreter does: exit code, threads, exit functions, buffers; what an
    interpreter would free is left to the system, which need not copy every page for that.
    """
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.path[0] = os.getcwd()
    sys.argv = ["qwen2kit", *order["arguments"]]
    code = 1
    try:
        runpy.run_module("qwen2kit", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, int | None):
            code = ended.code or 0
        else:
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.write(2, f"Exception ignored in: {stream!r}: {error}\n".encode())
            code = 120
    os._exit(code)


def _main() -> None:
    import gc
    from importlib import import_module

    for name in _PRELOADED:
        if find_spec(name.split(".")[0]) is not None:
            import_module(name)
    gc.freeze()  # or every process would walk through all of it as it ends
    order = _serve(socket.socket(fileno=int(sys.argv[1])))
    if order is not None:
        _become(order)


if __name__ == "__main__":
    _main()
