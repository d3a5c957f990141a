"""Load test of ``qwen2kit serve``: many streaming clients for minutes, errors, latency, memory.

    python benchmarks/serving.py MODEL [--clients 200] [--seconds 120] [--output FILE.json]
                                 [--malformed 500] [--dropped 200] [--plot FILE.png]
                                 [--free MS] [--chat] [--greedy]
                                 [-- OPTIONS OF SERVE]

Starts a server with room for all clients in its queue. Every client asks, reads the whole stream,
and asks again with another prompt; a third of the prompts begin alike, as system prompts do. After
the last answer the server gets SIGTERM and has to exit with 0. Meanwhile, if asked for, malformed
requests come in, each of which has to be refused with a status of 400 to 499, and clients that hang
up after their first token, whose slots others need.

On a GPU, with the 0.5B:

    python benchmarks/serving.py Qwen/Qwen2-0.5B-Instruct --words 200 --new 64,256 \\
        --output benchmarks/results/serving-0.5b-h100.json -- --slots 128 --dtype bfloat16

With ``--free MS`` the model costs nothing (`free_server.py`): what is left is the server's own
processor time, which the report has per token and per event.

Latencies are taken by the clients, which share one process (and here also the processor) with
nobody but each other: time to the first token, between tokens, and of the whole request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

WORDS = ["the", "cat", "sat", "on", "a", "mat", "one", "two", "what", "is", "answer", "of", "why"]
PERCENTILES = (50, 90, 95, 99)
MALFORMED = (
    ("POST", "/v1/completions", b"{"),
    ("POST", "/v1/completions", b"\xff\xfe"),
    ("POST", "/v1/completions", b"[" * 100_000),
    ("POST", "/v1/completions", b'{"model": "model"}'),
    ("POST", "/v1/completions", b'{"model": "model", "prompt": 7}'),
    ("POST", "/v1/completions", b'{"model": "model", "prompt": [-1]}'),
    ("POST", "/v1/completions", b'{"model": "another", "prompt": "a"}'),
    ("POST", "/v1/completions", b'{"model": "model", "prompt": "a", "max_tokens": -1}'),
    ("POST", "/v1/completions", b'{"model": "model", "prompt": "a", "temperature": "hot"}'),
    ("POST", "/v1/completions", b'{"model": "model", "prompt": "a", "n": 100000}'),
    ("POST", "/v1/chat/completions", b'{"model": "model", "messages": []}'),
    ("POST", "/v1/chat/completions", b'{"model": "model", "messages": [{"role": 1}]}'),
    ("POST", "/v1/nothing", b"{}"),
    ("PUT", "/v1/completions", b"{}"),
)
WARM_SHARE = 0.25
"""Of the run, after which memory should not grow any more."""


@dataclass
class Results:
    """What the clients saw; times in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    events: int = 0
    prompt_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    refused: int = 0
    dropped: int = 0


class Server:
    """The server process, its address and its memory over time."""

    def __init__(
        self, model: str, clients: int, options: Sequence[str], step_ms: float | None = None
    ) -> None:
        command = ["-m", "qwen2kit", "serve", model]
        if step_ms is not None:
            free = Path(__file__).with_name("free_server.py")
            command = [str(free), model, "--step-ms", str(step_ms)]
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", "0", "--name", "model",
             "--queue", str(2 * clients), *options],
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.log: list[str] = []
        self.memory: list[tuple[float, float]] = []
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        self._ready.wait()
        found = re.search(r"http://([^:/]+):(\d+)/v1", "".join(self.log))
        if found is None:
            sys.exit("".join(self.log))
        self.host, self.port = found[1], int(found[2])
        self.cpu: float | None = None
        self._start_cpu = self._cpu()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if "chat page" in line:
                self._ready.set()
        self._ready.set()

    def read_cpu(self) -> None:
        """Set ``cpu`` to its processor time since it was ready, where the system says."""
        now = self._cpu()
        if now is not None and self._start_cpu is not None:
            self.cpu = now - self._start_cpu

    def _cpu(self) -> float | None:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def watch_memory(self) -> None:
        """Resident megabytes, once a second."""
        start = time.perf_counter()
        while True:
            command = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            out = (await process.communicate())[0]
            if out.strip():
                self.memory.append((time.perf_counter() - start, int(out) / 1024))
            await asyncio.sleep(1)


async def client(
    server: Server, number: int, end: float, options: argparse.Namespace, results: Results
) -> None:
    """Ask until the time is over."""
    chance, words = random.Random(number), options.words
    new = tuple(int(part) for part in options.new.split(","))
    while time.perf_counter() < end:
        text = " ".join(chance.choices(WORDS, k=chance.randint(1, words)))
        if number % 3 == 0:
            text = " ".join(WORDS * 2) + " " + text
        body = {
            "model": "model", "max_tokens": chance.randint(*new), "stream": True,
            "stream_options": {"include_usage": True}, "temperature": float(not options.greedy),
            "seed": chance.randrange(1 << 30), "ignore_eos": True,
        }  # fmt: skip
        path = "/v1/completions"
        if options.chat:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        try:
            await _ask(server, path, body, results, checked=options.free is None)
        except (OSError, ValueError, EOFError, LookupError, TimeoutError) as error:
            results.errors.append(f"{type(error).__name__}: {error}")


async def malformed(server: Server, number: int, delay: float, results: Results) -> None:
    """One request that has to be refused, after ``delay`` seconds."""
    await asyncio.sleep(delay)
    method, path, body = MALFORMED[number % len(MALFORMED)]
    writer = None
    try:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(_head(server, method, path, len(body)) + body)
        status = (await asyncio.wait_for(reader.readline(), 60)).decode().split(" ", 2)[1]
        if not status.startswith("4"):
            raise ValueError(f"{method} {path} {body[:80]!r}: status {status}")
        results.refused += 1
    except (OSError, ValueError, IndexError, TimeoutError) as error:
        results.errors.append(f"malformed: {type(error).__name__}: {error}")
    finally:
        if writer is not None:
            writer.close()


async def dropped(server: Server, number: int, delay: float, results: Results) -> None:
    """One client that hangs up after its first token, after ``delay`` seconds."""
    await asyncio.sleep(delay)
    body = {"model": "model", "prompt": f"{number}", "max_tokens": 1000, "stream": True}
    data = json.dumps(body | {"ignore_eos": True}).encode()
    writer = None
    try:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(_head(server, "POST", "/v1/completions", len(data)) + data)
        while line := await asyncio.wait_for(reader.readline(), 120):
            if line.startswith(b"data: "):
                results.dropped += 1
                break
    except (OSError, TimeoutError) as error:
        results.errors.append(f"dropped: {type(error).__name__}: {error}")
    finally:
        if writer is not None:
            writer.transport.abort()


def _head(server: Server, method: str, path: str, length: int) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: {server.host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def _ask(
    server: Server, path: str, body: dict[str, Any], results: Results, *, checked: bool
) -> None:
    """One answer; every event is read as JSON if ``checked``, else those without text."""
    data = json.dumps(body).encode()
    start = last = time.perf_counter()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(_head(server, "POST", path, len(data)) + data)
        status = (await reader.readline()).decode().split(" ", 1)[1].strip()
        if not status.startswith("200"):
            raise ValueError(status)
        await reader.readuntil(b"\r\n\r\n")
        usage, first = None, True
        while True:
            event = (await reader.readuntil(b"\n\n")).partition(b"data: ")[2]
            now = time.perf_counter()
            if event.startswith(b"[DONE]"):
                break
            if b'"role":"assistant"' in event:
                continue
            if b'"choices":[{' not in event or checked:
                document = json.loads(event)
                if "error" in document:
                    raise ValueError(document["error"]["message"])
                usage = document.get("usage") or usage
                if not document["choices"]:
                    continue
            (results.first if first else results.between).append(now - last)
            first, last = False, now
            results.events += 1
        if usage is None:
            raise EOFError("the stream ended early")
        results.whole.append(time.perf_counter() - start)
        results.tokens += usage["completion_tokens"]
        results.prompt_tokens += usage["prompt_tokens"]
    finally:
        writer.close()


async def run(server: Server, options: argparse.Namespace, results: Results) -> None:
    """All clients together, until the last answer."""
    start = time.perf_counter()
    beside = [asyncio.create_task(server.watch_memory()), asyncio.create_task(tell(results))]
    await asyncio.gather(
        *(
            client(server, number, start + options.seconds, options, results)
            for number in range(options.clients)
        ),
        *(
            kind(server, number, options.seconds * (number + 1) / (count + 1), results)
            for kind, count in ((malformed, options.malformed), (dropped, options.dropped))
            for number in range(count)
        ),
    )
    for task in beside:
        task.cancel()


async def tell(results: Results) -> None:
    """How far it is, every ten seconds."""
    start = time.perf_counter()
    while True:
        await asyncio.sleep(10)
        seconds = time.perf_counter() - start
        print(
            f"{seconds:5.0f} s: {len(results.whole)} answers, {results.tokens / seconds:.0f} "
            f"tokens/s, {len(results.errors)} errors",
            file=sys.stderr,
            flush=True,
        )


def document(
    server: Server, results: Results, seconds: float, ended: int | str, options: argparse.Namespace
) -> dict[str, Any]:
    """The report; ``ended`` is the server's exit code, or why it has none."""
    cpu = server.cpu
    return {
        "command": "python benchmarks/serving.py " + " ".join(["MODEL", *sys.argv[2:]]),
        "machine": {
            "device": options.device,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("fastapi", "uvicorn")},
        },
        "clients": options.clients,
        "seconds": seconds,
        "requests": len(results.whole),
        "malformed_refused": results.refused,
        "clients_that_hung_up": results.dropped,
        "errors": len(results.errors),
        "first_errors": results.errors[:5],
        "exit_code": ended,
        "prompt_tokens": results.prompt_tokens,
        "tokens": results.tokens,
        "events": results.events,
        "server_cpu_seconds": cpu,
        "server_cpu_ms_per_1000_tokens": cpu and 1e6 * cpu / max(1, results.tokens),
        "server_cpu_ms_per_1000_events": cpu and 1e6 * cpu / max(1, results.events),
        "tokens_per_second": results.tokens / seconds,
        "requests_per_second": len(results.whole) / seconds,
        "first_token_ms": summary(results.first),
        "between_tokens_ms": summary(results.between),
        "request_ms": summary(results.whole),
        "memory": memory_summary(server.memory),
    }


def summary(values: list[float]) -> dict[str, float]:
    """Mean, percentiles and maximum in milliseconds."""
    import numpy as np

    if not values:
        return {}
    array = np.array(values) * 1000
    found = {f"p{p}": float(np.percentile(array, p)) for p in PERCENTILES}
    return {"mean": float(array.mean()), **found, "max": float(array.max())}


def memory_summary(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Megabytes at the start, when warm, at the end and at most; growth per minute once warm."""
    import numpy as np

    if not samples:
        return {}
    times, sizes = np.array(samples).T
    warm = times >= WARM_SHARE * times[-1]
    slope = np.polyfit(times[warm], sizes[warm], 1)[0] if warm.sum() > 2 else 0.0
    return {
        "start_mb": float(sizes[0]),
        "warm_mb": float(sizes[warm][0]),
        "end_mb": float(sizes[-1]),
        "peak_mb": float(sizes.max()),
        "growth_mb_per_minute": float(slope * 60),
    }


def draw(found: dict[str, Any], results: Results, memory: Any, path: Path) -> None:
    """Memory over time, and the distributions of the latencies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    axes[0].plot(*zip(*memory, strict=True))
    axes[0].set(xlabel="seconds", ylabel="resident MB", ylim=(0, None), title="Server's memory")
    for name in ("first", "between", "whole"):
        values = np.sort(np.array(getattr(results, name)) * 1000)
        axes[1].plot(values, np.linspace(0, 1, len(values)), label=name)
    title = f"{found['clients']} clients, {found['tokens_per_second']:.0f} tokens/s"
    axes[1].set(xscale="log", xlabel="ms", ylabel="share of requests or tokens", title=title)
    axes[1].legend(["first token", "between tokens", "whole request"])
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--words", type=int, default=60, help="longest prompt in words")
    parser.add_argument("--new", default="8,64", help="least and most tokens per answer")
    parser.add_argument("--malformed", type=int, default=0, help="requests to be refused")
    parser.add_argument("--dropped", type=int, default=0, help="clients that hang up")
    parser.add_argument(
        "--free", type=float, metavar="MS", help="a model that costs nothing but MS a step"
    )
    parser.add_argument("--chat", action="store_true", help="ask the chat endpoint")
    parser.add_argument("--greedy", action="store_true", help="temperature 0 instead of 1")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--device", default=platform.processor() or platform.machine())
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, serve_options = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    server = Server(options.model, options.clients, serve_options, options.free)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut off"))
    results, start = Results(), time.perf_counter()
    try:
        asyncio.run(run(server, options, results))
        seconds = time.perf_counter() - start
        server.read_cpu()
        server.process.send_signal(signal.SIGTERM)
        ended: int | str = server.process.wait(60)
    except subprocess.TimeoutExpired:
        ended = "none 60 s after SIGTERM"
    except SystemExit as reason:
        ended, seconds = str(reason), time.perf_counter() - start
    finally:
        server.process.kill()
    found = document(server, results, seconds, ended, options)
    text = json.dumps(found, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    if options.plot is not None:
        draw(found, results, server.memory, options.plot)
    if results.errors or ended != 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
