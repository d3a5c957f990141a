"""The Python of the README runs as it stands, on a tiny checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen2kit.backend.registry import installed
from tests.arch.source_tree import ROOT
from tests.tiny_checkpoint import write_tiny_checkpoint


def test_python_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not installed():
        pytest.skip("no backend is installed")
    write_tiny_checkpoint(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    text = "\n".join(blocks)
    smaller = {
        '"hf-model"': repr(str(tmp_path)),
        '"mlx"': repr(installed()[0]),
        "max_new_tokens=64": "max_new_tokens=4",
        "temperature=0.7": "temperature=0.7, max_new_tokens=4",
        "capacity=4096": "capacity=64",
    }
    for old, new in smaller.items():
        assert old in text
        text = text.replace(old, new)
    exec(compile(text, "README.md", "exec"), {})
    assert re.search(r"\b(length|stop)\b", capsys.readouterr().out)
