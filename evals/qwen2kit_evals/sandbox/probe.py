"""What a sandbox holds back, found out by trying; and the strongest one this machine allows."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2kit.errors import BackendError
from qwen2kit_evals.sandbox import landlock, seccomp
from qwen2kit_evals.sandbox.limits import Layer, Limits
from qwen2kit_evals.sandbox.run import Sandbox, SandboxError

_LIMITS = Limits(seconds=10.0)
_PROBE = """
import fractions, json, os, socket
possible = []

def attempt(name, action):
    try:
        action()
    except BaseException:
        return
    possible.append(name)

def connect():
    socket.create_connection(("127.0.0.1", {port}), 1)

def send():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port}))

def stay():
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.write(writer, b"x")
        import time
        time.sleep(4)
        os._exit(0)
    os.read(reader, 1)

def multiply():
    reader, writer = os.pipe()
    children = []
    try:
        while len(children) <= {processes}:
            if not (child := os.fork()):
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)
            children.append(child)
    finally:
        os.close(writer)
        for child in children:
            os.waitpid(child, 0)

attempt("start any number of processes", multiply)
attempt("use the network", connect)
attempt("use the network", send)
attempt("read your files", lambda: open({readable!r}).read())
attempt("write outside their directory", lambda: open({writable!r}, "w"))
attempt("signal other processes", lambda: os.kill({parent}, 0))
print(json.dumps(sorted(set(possible))), flush=True)
attempt("", stay)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """A sandbox and what a probe in it could do.

    Attributes:
        sandbox: ready to run programs.
        breaches: what programs can do that they should not; empty for full isolation.
    """

    sandbox: Sandbox
    breaches: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """For results: layers, breaches and limits."""
        limits = self.sandbox.limits
        return {
            "layers": list(self.sandbox.layers),
            "breaches": list(self.breaches),
            "limits": {name: getattr(limits, name) for name in limits.__dataclass_fields__},
        }


def strongest_sandbox(limits: Limits | None = None, *, weak: bool = False) -> Isolation:
    """Try the combinations of `candidates` and take the first from which nothing gets out.

    Args:
        limits: of the sandbox returned.
        weak: if there is none, take the one with the fewest breaches.

    Raises:
        BackendError: there is none and ``weak`` was not given; or programs cannot run at all.
    """
    limits = limits or Limits()
    found: list[Isolation] = []
    reason = ""
    for layers in candidates():
        try:
            breaches = probe(Sandbox(layers=layers, limits=_LIMITS))
        except SandboxError as error:
            reason = str(error)
            continue
        found.append(Isolation(sandbox=Sandbox(layers=layers, limits=limits), breaches=breaches))
        if not breaches:
            return found[-1]
    if not found:
        raise BackendError(f"programs cannot be run in a sandbox here: {reason}")
    best = min(found, key=lambda isolation: len(isolation.breaches))
    if weak:
        return best
    raise BackendError(
        f"this machine cannot isolate generated programs: they could {', '.join(best.breaches)}; "
        "run where namespaces or Landlock are allowed, or accept it with --weak-sandbox"
    )


def candidates() -> Iterator[tuple[Layer, ...]]:
    """Combinations of layers that may work here, strongest first, none at all last."""
    rules: tuple[Layer, ...] = ()
    if platform.system() == "Darwin":
        rules = ("seatbelt",)
    calls: tuple[Layer, ...] = ("seccomp",) if seccomp.available() else ()
    user: tuple[Layer, ...] = ("user",) if os.geteuid() == 0 else ()
    if calls:
        yield from dict.fromkeys([("namespaces", *calls, *user), ("namespaces", *calls)])
        if landlock.version():
            rules = ("landlock",)
    yield from dict.fromkeys([(*rules, *calls, *user), (*rules, *calls), (*calls, *user), ()])


def probe(sandbox: Sandbox) -> tuple[str, ...]:
    """What a program in ``sandbox`` can do that it should not.

    Raises:
        SandboxError: it cannot run there.
    """
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server,
    ):
        Path(directory).chmod(0o777)
        readable, writable = Path(directory, "readable"), Path(directory, "writable")
        for path in (readable, writable):
            path.touch()
            path.chmod(0o666)
        outcome = sandbox.run(
            _PROBE.format(
                port=server.getsockname()[1],
                readable=str(readable),
                writable=str(writable),
                parent=os.getpid(),
                processes=sandbox.limits.processes,
            )
        )
    if not outcome.passed:
        raise SandboxError(f"a trial program did not run: {outcome.detail}")
    possible: Sequence[str] = json.loads(outcome.output.splitlines()[0])
    return (*possible, *(["leave processes behind"] if outcome.survivors else []))
