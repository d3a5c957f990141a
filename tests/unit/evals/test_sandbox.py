"""Programs that try to get out of the sandbox, under every set of layers that holds here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="sandboxed programs need a POSIX system")

from qwen2kit.errors import BackendError
from qwen2kit_evals.sandbox import probe as probing
from qwen2kit_evals.sandbox import run, seatbelt
from qwen2kit_evals.sandbox.limits import Layer, Limits, Outcome
from qwen2kit_evals.sandbox.probe import candidates, probe, strongest_sandbox
from qwen2kit_evals.sandbox.run import Sandbox, SandboxError

CONFINED = [layers for layers in candidates() if {"namespaces", "landlock", "seatbelt"} & {*layers}]
MARK = f"  # started by the tests of {os.getpid()}"
TRY = """
import os, socket
done = []
def attempt(name, action):
    try:
        action()
    except BaseException as error:
        return error
    done.append(name)
"""


@cache
def breaches(layers: tuple[Layer, ...]) -> tuple[str, ...] | None:
    """What `probe` finds; None if the layers cannot be had here."""
    try:
        return probe(Sandbox(layers=layers, limits=Limits(seconds=10.0)))
    except SandboxError:
        return None


@pytest.fixture(params=CONFINED, ids="+".join)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """A sandbox with a short time-out."""
    if breaches(request.param) is None:
        pytest.skip("these layers cannot be had here")
    return Sandbox(layers=request.param, limits=Limits(seconds=0.8))


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_START", run._START + MARK)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """After the test no launcher, keeper or program may be running."""
    yield
    if sys.platform == "linux":
        until(lambda: launchers() == [])


def launchers() -> list[int]:
    """Processes that our sandboxes started, and theirs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if MARK.encode() in arguments:
            found.append(int(entry.name))
    return found


def attempts(sandbox: Sandbox, body: str) -> list[str]:
    """Names of the attempts in ``body`` that succeeded."""
    outcome = sandbox.run(f"{TRY}\n{body}\nprint('DONE', *done)")
    assert outcome.passed, outcome
    return outcome.output.splitlines()[-1].split()[1:]


def test_one_of_them_holds_here() -> None:
    if sys.platform == "linux":
        assert () in [breaches(layers) for layers in CONFINED]


def test_a_probe_gets_nowhere(sandbox: Sandbox) -> None:
    assert breaches(sandbox.layers) == ()


@pytest.mark.parametrize(
    ("program", "verdict", "detail"),
    [
        ("assert sorted([2, 1]) == [1, 2]", "passed", ""),
        ("import numpy; assert numpy.ones(3).sum() == 3", "passed", ""),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)", "passed", ""),
        ("if __name__ == '__main__':\n    raise ValueError", "passed", ""),
        ("open('f', 'w').write('x'); assert open('f').read() == 'x'", "passed", ""),
        ("import asyncio\nasyncio.run(asyncio.sleep(0))", "passed", ""),
        ("import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()", "passed", ""),
        ("assert 1 == 2, 'no'", "failed", "AssertionError: no"),
        ("def f(:", "failed", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("import sys; sys.exit(0)", "failed", "SystemExit: 0"),
        ("import os; os._exit(0)", "failed", "left with exit code 0"),
        ("input()", "failed", "EOFError: EOF when reading a line"),
        ("def f(): f()\nf()", "failed", "RecursionError: maximum recursion depth exceeded"),
        ("class E(Exception):\n    def __str__(self): return 1\nraise E", "failed", "E"),
        ("import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV"),
        ("while True: pass", "timed out", "after 1 s"),
        ("import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass",
         "timed out", "after 1 s"),
        ("import qwen2kit_evals.sandbox.run", "failed",
         "ModuleNotFoundError: No module named 'qwen2kit_evals'"),
    ],
    ids=range(18),
)  # fmt: skip
def test_ends_are_told_apart(program: str, verdict: str, detail: str) -> None:
    outcome = strongest().run(program)
    assert (outcome.verdict, outcome.detail) == (verdict, detail), outcome
    assert outcome.passed == (verdict == "passed")
    assert not outcome.survivors


@pytest.mark.parametrize("layers", [layers for layers in CONFINED if "namespaces" in layers])
def test_packages_below_the_temporary_directory_are_seen(
    layers: tuple[Layer, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if breaches(layers) is None:
        pytest.skip("these layers cannot be had here")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # as an environment there would be
        packages = Path(folder, "packages")
        packages.mkdir(mode=0o755)
        (packages / "planted.py").write_text("fruit = 7")
        known = run._import_path()
        monkeypatch.setattr(run, "_import_path", lambda: [*known, str(packages)])
        own = Sandbox(layers=layers, limits=Limits(seconds=2.0))
        found = own.run("import planted; open('f', 'w'); print(planted.fruit)")
        assert (found.verdict, found.output) == ("passed", "7\n"), found
        for place in (packages / "x", Path(folder, "x")):
            assert attempts(own, f"attempt('write', lambda: open({str(place)!r}, 'w'))") == []


def test_memory_is_limited(sandbox: Sandbox) -> None:
    small = Sandbox(layers=sandbox.layers, limits=Limits(memory_bytes=256 << 20))
    assert small.run("x = [bytearray(1 << 24) for _ in range(99)]").detail == "MemoryError: "


@cache
def strongest() -> Sandbox:
    return strongest_sandbox(Limits(seconds=1.0), weak=True).sandbox


@pytest.mark.usefixtures("nothing_left")
def test_a_fork_bomb_ends_with_its_time(sandbox: Sandbox) -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    started = time.monotonic()
    outcome = sandbox.run(bomb)
    assert outcome.verdict == "timed out"
    assert not outcome.survivors
    assert time.monotonic() - started < 10
    assert "start any number of processes" not in (breaches(sandbox.layers) or ())


@pytest.mark.usefixtures("nothing_left")
def test_a_thread_bomb_ends_too(sandbox: Sandbox) -> None:
    bomb = (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[60]).start()"
    )
    outcome = sandbox.run(bomb)
    assert not outcome.passed
    assert not outcome.survivors


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("closing", [False, True], ids=["plain", "closes-its-output"])
def test_background_processes_do_not_outlive_it(sandbox: Sandbox, closing: bool) -> None:
    close = "os.closerange(0, 64)" if closing else "pass"
    program = (
        "import os, time\ntry:\n    for _ in range(3):\n        if os.fork() == 0:\n"
        f"            os.setsid()\n            {close}\n            if os.fork() == 0:\n"
        "                time.sleep(60)\n            os._exit(0)\nexcept PermissionError: pass"
    )
    outcome = sandbox.run(program)
    assert outcome.passed, outcome
    assert not outcome.survivors


def test_other_processes_are_out_of_reach(sandbox: Sandbox) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        attempts(
            sandbox,
            f"""
import ctypes, signal
for target in ({bystander.pid}, {os.getpid()}, os.getppid(), 1, -1):
    attempt("kill", lambda: os.kill(target, signal.SIGKILL))
attempt("killpg", lambda: os.killpg({os.getpgid(0)}, signal.SIGKILL))
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(16, {bystander.pid}, None, None) == 0: done.append("ptrace")
""",
        )
        assert bystander.poll() is None
        bystander.kill()


def test_sockets_lead_nowhere(sandbox: Sandbox, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        named.bind(str(tmp_path / "s"))
        named.listen()
        tmp_path.chmod(0o777)
        name = f"qwen2kit-{os.getpid()}"
        if sys.platform == "linux":
            abstract.bind("\0" + name)
            abstract.listen()
        reached = attempts(
            sandbox,
            f"""
def connect(family, address, kind=socket.SOCK_STREAM):
    def action():
        with socket.socket(family, kind) as s:
            s.settimeout(1)
            s.connect(address)
            s.send(b"x")
    return action
attempt("tcp", connect(socket.AF_INET, ("127.0.0.1", {tcp.getsockname()[1]})))
attempt("udp", connect(socket.AF_INET, ("127.0.0.1", 9), socket.SOCK_DGRAM))
attempt("ipv6", connect(socket.AF_INET6, ("::1", {tcp.getsockname()[1]})))
attempt("unix", connect(socket.AF_UNIX, {str(tmp_path / "s")!r}))
attempt("abstract", connect(socket.AF_UNIX, "\\0{name}"))
attempt("listen", lambda: socket.create_server(("127.0.0.1", 0)))
""",
        )
        assert reached == []


def test_nothing_outside_can_be_written(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    mine = tmp_path / "mine"
    mine.write_text("before")
    mine.chmod(0o666)
    places = [tmp_path / "new", mine, Path.home() / "x", Path.cwd() / "x", "/x", "/usr/x",
              "/dev/shm/x", "/var/tmp/x", Path(run.__file__).parent / "x", Path(sys.prefix) / "x",
              Path(os.__file__).parent / "x", "../x", "../../x"]  # fmt: skip
    body = "\n".join(
        f"attempt({str(place)!r}, lambda: open({str(place)!r}, 'w').write('x'))" for place in places
    )
    body += f"\nattempt('unlink', lambda: os.unlink({str(mine)!r}))"
    body += f"\nattempt('rename', lambda: os.rename({str(mine)!r}, 'stolen'))"
    body += f"\nattempt('mkdir', lambda: os.mkdir({str(tmp_path / 'd')!r}))"
    body += f"\nattempt('symlink', lambda: os.symlink({str(mine)!r}, 's') or open('s', 'w'))"
    assert attempts(sandbox, body) == []
    assert mine.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_nothing_of_yours_can_be_read(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    for path in (tmp_path, secret):
        path.chmod(0o777)
    files = [secret, "/etc/passwd", "/proc/self/environ", f"/proc/{os.getpid()}/environ",
             f"/proc/{os.getpid()}/root{secret}", Path(run.__file__)]  # fmt: skip
    body = "\n".join(
        f"attempt({str(file)!r}, lambda: open({str(file)!r}).read())" for file in files
    )
    body += f"""
for directory in ({str(Path.home())!r}, {str(tmp_path)!r}, {str(Path.cwd())!r}):
    names = []
    attempt("list", lambda: names.extend(os.listdir(directory)))
    if "secret" in names or ".cache" in names or "pyproject.toml" in names: done.append("found")
attempt("link", lambda: os.link({str(secret)!r}, "l"))
attempt("chroot", lambda: os.chroot(".."))
"""
    assert {*attempts(sandbox, body)} <= {"list"}


def test_no_environment_and_no_descriptors_come_along(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "1234")
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = sandbox.run(
            "import os, stat\nprint('SECRET_KEY' in os.environ, sorted(os.environ))\n"
            "def kind(n):\n    try: return stat.S_IFMT(os.fstat(n).st_mode)\n"
            "    except OSError: return None\n"
            "kinds = {n: kind(n) for n in range(64) if kind(n) is not None}\n"
            "assert kinds.pop(0) == stat.S_IFCHR\n"
            "assert set(kinds.values()) == {stat.S_IFIFO}, kinds\n"
            "assert len(kinds) == 3, kinds"
        )
    assert outcome.passed, outcome
    assert outcome.output.startswith("False ")


def test_output_is_cut_and_disks_stay_empty(sandbox: Sandbox) -> None:
    started = time.monotonic()
    outcome = sandbox.run("while True: print('x' * 100_000)")
    assert outcome.verdict == "timed out"
    assert outcome.output == "x" * sandbox.limits.output_bytes
    assert time.monotonic() - started < 10
    hog = "open('big', 'wb').write(bytes(99 << 20))"
    assert sandbox.run(hog).detail.startswith("OSError: [Errno 27]")
    if "namespaces" in sandbox.layers:
        many = "for n in range(9): open(f'f{n}', 'wb').write(bytes(9 << 20))"
        assert sandbox.run(many).detail.startswith("OSError: [Errno 28]")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own calls")
def test_new_rights_are_not_to_be_had(sandbox: Sandbox) -> None:
    body = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, *arguments in (
    ("unshare", 0x10000000), ("unshare", 0x20000), ("setns", 0, 0), ("chroot", b"/"),
    ("mount", b"tmpfs", b".", b"tmpfs", 0, None), ("umount2", b"/", 2),
    ("syscall", 425, 8, ctypes.create_string_buffer(256)), ("setuid", 7),
):
    if getattr(libc, name)(*arguments) != -1: done.append(name)
"""
    assert attempts(sandbox, body) == []


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_programs_die_with_their_caller(sandbox: Sandbox, tmp_path: Path) -> None:
    caller = (
        "from qwen2kit_evals.sandbox import run\n"
        "from qwen2kit_evals.sandbox.limits import Limits\n"
        f"run._START += {MARK!r}\n"
        f"sandbox = run.Sandbox(layers={sandbox.layers!r}, limits=Limits(seconds=60.0))\n"
        "sandbox.run('while True: pass')"
    )
    # A killed caller leaves the program's directory behind.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", caller], env=environment) as process:
        until(lambda: len(launchers()) >= 2)
        process.send_signal(signal.SIGKILL)
    until(lambda: launchers() == [])


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_layers_the_probe_sees_every_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {*probe(Sandbox(layers=(), limits=Limits(seconds=10.0)))}
    assert found == {
        "use the network", "read your files", "write outside their directory",
        "signal other processes", "leave processes behind",
        *(["start any number of processes"] if os.geteuid() == 0 else []),
    }  # fmt: skip
    monkeypatch.setattr(probing, "candidates", lambda: iter([()]))
    monkeypatch.setattr(probing, "probe", lambda sandbox: tuple(sorted(found)))
    with pytest.raises(BackendError, match=r"could leave processes behind, read.*--weak-sandbox"):
        strongest_sandbox()
    weak = strongest_sandbox(weak=True)
    assert weak.document()["breaches"] == sorted(found)


def test_a_layer_that_fails_stops_the_program() -> None:
    wrong: tuple[Layer, ...] = ("landlock",) if sys.platform == "darwin" else ("seatbelt",)
    with pytest.raises(SandboxError, match="could not be isolated"):
        Sandbox(layers=wrong).run("open('ran', 'w')")


def test_macos_rules_quote_paths() -> None:
    rules = seatbelt.profile(['/a "b"'], ["/w"])
    assert '(subpath "/a \\"b\\"")' in rules
    assert "(deny network*)" in rules
    assert '(allow file-write* (literal "/dev/null") (subpath "/w"))' in rules


def test_outcomes_are_told_by_the_keeper_alone() -> None:
    """A program that writes what a keeper would read has not passed."""
    forged = (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'passed 1234')\n"
        "    except OSError: pass\nos._exit(0)"
    )
    outcome: Outcome = strongest().run(forged)
    assert not outcome.passed
