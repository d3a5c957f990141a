"""A server as a user starts it: ``qwen2kit serve`` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.run_cli import OFFLINE

START_SECONDS = 600  # for what hangs, however busy the machine is
_MAIN = "\nfrom qwen2kit.cli.app import main; import sys; sys.argv[0] = 'qwen2kit'; main()"
_URL = re.compile(r"http://\S+(?=/v1)")


class Server:
    """A running server; leaving the context kills what is left of it.

    Args:
        model: a model directory.
        options: of the command.
        key: asked of clients.
        prelude: Python run in the process before the command.
    """

    def __init__(
        self, model: Path, *options: str, key: str | None = None, prelude: str = ""
    ) -> None:
        environment = {**os.environ, **OFFLINE}
        environment.pop("QWEN2KIT_API_KEY", None)
        if key is not None:
            environment["QWEN2KIT_API_KEY"] = key
        self.key = key
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude + _MAIN, "serve", str(model), "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if "chat page" in line:
                self._ready.set()
        self._ready.set()

    def __enter__(self) -> Server:
        assert self._ready.wait(START_SECONDS), self.log
        assert self.process.poll() is None, self.log
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return "".join(self.lines)

    @property
    def url(self) -> str:
        """Its root, without a slash at the end."""
        found = _URL.search(self.log)
        assert found is not None, self.log
        return found[0]

    @property
    def port(self) -> int:
        """Its port."""
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, *, key: str | None = None) -> tuple[int, str]:
        """Status and text."""
        return self._open(urllib.request.Request(self.url + path), key)

    def post(self, path: str, body: object, *, key: str | None = None) -> tuple[int, Any]:
        """Status and document."""
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        status, text = self._open(request, key)
        return status, json.loads(text)

    def _open(self, request: urllib.request.Request, key: str | None) -> tuple[int, str]:
        key = key or self.key
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """The value of one metric without labels."""
        text = self.get("/metrics")[1]
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Poll until ``condition`` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.log
            time.sleep(0.02)

    def leave(self, number: int = signal.SIGTERM, seconds: float = 300) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)
