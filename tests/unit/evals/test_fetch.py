"""Staging data, with the genuine Hub client, from a Hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qwen2kit_evals.local_data import LocalData
from tests.unit.evals.test_local_data import write_set

COMMIT = "0" * 40
FETCH = """
import sys
from pathlib import Path
from qwen2kit_evals.fetch import fetch_data
for item in fetch_data(sys.argv[2:], Path(sys.argv[1])):
    print(item.name, item.state, item.problem, sep="|")
"""


class Hub(BaseHTTPRequestHandler):
    """The four answers that downloading a data set takes."""

    root: Path

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/datasets/"):
            self._info("/".join(path.split("/")[3:5]))
        else:
            _, _, org, name, _, _, *rest = path.split("/")
            self._file(self.root / org / name / "/".join(rest))

    do_HEAD = do_GET

    def _info(self, name: str) -> None:
        home = self.root / name
        if not home.is_dir():
            error = "GatedRepo" if name == "org/gated" else "RepoNotFound"
            self._send(403 if name == "org/gated" else 404, b"{}", **{"X-Error-Code": error})
            return
        files = [str(p.relative_to(home)) for p in sorted(home.rglob("*")) if p.is_file()]
        tree = [
            {"type": "file", "path": f, "size": (home / f).stat().st_size, "oid": "1"}
            for f in files
        ]
        document = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
        self._send(200, json.dumps(tree if "/tree/" in self.path else document).encode())

    def _file(self, file: Path) -> None:
        content = file.read_bytes()
        digest = hashlib.sha1(content).hexdigest()
        self._send(200, content, **{"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    write_set(tmp_path / "hub", "org/one", {"main": {"train": 3, "test": 2}})
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def fetch(hub: str, to: Path, *names: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FETCH, str(to), *names], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(to / "hf"), "HF_HUB_OFFLINE": "0",
             "HF_HUB_DISABLE_XET": "1"} | env,
    )  # fmt: skip


def test_data_are_staged_in_hub_layout_and_read_offline(hub: str, tmp_path: Path) -> None:
    to = tmp_path / "staged"
    (to / "org/mine").mkdir(parents=True)
    (to / "org/mine/test.jsonl").write_text('{"text": "kept"}\n')
    done = fetch(hub, to, "org/one", "org/mine", "org/none", "org/gated")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("|", 1) for line in done.stdout.splitlines())
    assert lines["org/one"] == "fetched|"
    assert lines["org/mine"] == "present|"
    assert lines["org/none"] == "absent|no such data set, or it is private"
    assert lines["org/gated"].startswith("absent|gated; accept its terms at https://")
    data = LocalData(to)
    assert data.splits("org/one", "main") == ("train", "test")
    source = tmp_path / "hub/org/one/main/train.jsonl"
    assert (to / "org/one/main/train.jsonl").read_bytes() == source.read_bytes()
    again = fetch(hub, to, "org/one")
    assert again.stdout == "org/one|present|\n"


def test_offline_is_respected(hub: str, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path / "staged", "org/one", HF_HUB_OFFLINE="1")
    assert "ConfigError: fetch needs the network, but HF_HUB_OFFLINE is set" in done.stderr
    assert not (tmp_path / "staged").exists()


def test_a_failing_network_is_reported(tmp_path: Path) -> None:
    done = fetch("http://127.0.0.1:9", tmp_path / "staged", "org/one")
    name, state, problem = done.stdout.strip().split("|")
    assert (name, state) == ("org/one", "absent")
    assert problem
    assert not (tmp_path / "staged/org/one").exists()
