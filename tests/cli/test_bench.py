"""``qwen2kit bench``: sections, roofs, JSON, curves, errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2kit.backend.registry import installed
from tests.run_cli import run_cli, run_json
from tests.tiny_checkpoint import write_tiny_checkpoint

SMALL = ("--prefill", "8,32", "--contexts", "8", "--streams", "1,4", "--prompt", "8", "--new", "6",
         "--repeats", "1")  # fmt: skip


@pytest.fixture(scope="module")
def backend() -> str:
    if not installed():
        pytest.skip("no backend installed")
    return installed()[0]


def test_random_weights(backend: str, tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    document = run_json("bench", "--random", "tiny", *SMALL, "--plot", picture, cold=True)
    assert document["model"] == "tiny (random weights)"
    assert document["parameters"] == 509_568
    assert document["failures"] == []
    assert [entry["tokens"] for entry in document["prefill"]] == [8, 32]
    (decode,) = document["decode"]
    assert decode["tokens_per_second"] > 0
    assert [entry["streams"] for entry in document["throughput"]] == [1, 4]
    assert set(document["throughput"][0]["first_token"]) == {"p50", "p90", "p99"}
    assert document["roof"]["copy_bandwidth"] > 1e8
    assert 0 < decode["roof_share"] < 1
    assert document["memory"]["peak_bytes"] > 1e7
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_and_tables(backend: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    done = run_cli("bench", tmp_path, "--backend", backend, *SMALL, "--streams", "")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for text in ("prefill", "decoding, one stream", "of roof", "peak memory", "GB/s"):
        assert text in done.stderr
    assert "many streams" not in done.stderr


def test_guesses_are_counted(backend: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "large")
    write_tiny_checkpoint(tmp_path / "small", num_hidden_layers=1)
    sections = ("--prefill", "", "--contexts", "60", "--streams", "2", "--new", "16")
    entries = [
        run_json("bench", tmp_path / "large", "--backend", backend, *sections, *how)["decode"][0]
        for how in ((), ("--prompt-lookup", "4"), ("--draft", tmp_path / "small"))
    ]
    assert entries[0]["drafted"] == 0
    assert all(entry["drafted"] >= entry["accepted"] for entry in entries)
    assert entries[1]["drafted"] > 0
    assert entries[2]["drafted"] > 0


def test_what_becomes_of_packed_weights_is_told() -> None:
    pytest.importorskip("torch")
    done = run_cli("bench", "--random", "tiny", "--backend", "torch", "--weight-bits", "8", *SMALL,
                   "--streams", "", "--contexts", "")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: a CPU decodes 8-bit weights" in done.stderr
    assert "prefill of 8 tokens" in done.stderr  # progress where there is no terminal


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "give a MODEL, or --random"),
        (("some", "--random", "tiny"), "give a MODEL, or --random"),
        (("--random", "tiny", "--streams", "1,x"), "--streams takes numbers"),
        (("--random", "tiny", "--new", "1"), "at least 2 new tokens"),
        (("--random", "tiny", "--prompt", "0"), "must be positive"),
        (("--random", "tiny", "--prefill", "4096"), "takes 512; lower --prefill"),
        (("--random", "tiny", "--streams", "9" * 400), "make no sense"),
        (("--random", "tiny", "--plot", "curves.txt"), "name a .png file"),
        (("--random", "tiny", "--plot", "absent/curves.png"), "no directory absent"),
        (("absent", "--draft", "x", "--prompt-lookup", "4"), "give one of them"),
        (("absent", "--prompt-lookup", "0"), "at least 1 token"),
        (("--random", "huge"), "unknown preset"),
        (("--random", "tiny", "--prompt-lookup", "4"), "nothing that could be guessed"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], reason: str) -> None:
    done = run_cli("bench", *arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
