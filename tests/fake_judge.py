"""A judge on loopback: OpenAI's chat-completions interface with scripted answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, Any] | tuple[int, Any, dict[str, str]]


@dataclass
class FakeJudge:
    """What was asked of it, and where it is.

    Attributes:
        url: base address.
        requests: path, headers and body of every request.
    """

    url: str
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        """The last message of every request."""
        return [body["messages"][-1]["content"] for _, _, body in self.requests]


@contextmanager
def fake_judge(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[FakeJudge]:
    """Serve ``reply(body)``: an answer's text, or status, JSON document and headers."""
    judge = FakeJudge("")
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                judge.requests.append((self.path, dict(self.headers), body))
                answer = reply(body)
            if isinstance(answer, str):
                answer = (200, {"choices": [{"message": {"content": answer}}]})
            status, document, headers = (*answer, {})[:3]
            content = json.dumps(document).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
