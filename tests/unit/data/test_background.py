"""Working ahead: the same batches, the state of what was handed out, no thread left behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2kit.config.data_tree import TextData
from qwen2kit.data import background
from qwen2kit.data.background import Background, Closed, Prefetched
from qwen2kit.data.loader import Loader
from qwen2kit.errors import DataError
from tests.unit.data.make_data import opener, rows_of, sentences, write_lines

ROOT = Path(__file__).parents[3]


def alive() -> int:
    return threading.active_count()


def settle(wanted: int) -> int:
    """Threads, once there are ``wanted`` of them or a long time has passed."""
    deadline = time.monotonic() + 300
    while alive() > wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return alive()


@pytest.fixture
def stream(tmp_path: Path) -> TextData:
    data = write_lines(tmp_path / "t.txt", sentences(120))
    return TextData(paths=data.paths, split="line", stream=True, shuffle_rows=6)


def loader(data: TextData) -> Loader:
    return Loader(opener().source(data), batch_rows=4)


def test_batches_and_states_are_those_of_the_loader(stream: TextData) -> None:
    plain = loader(stream)
    with Prefetched(loader(stream), ahead=3) as ahead:
        for _ in range(10):
            assert ahead.state() == plain.state() or ahead.state()["taken"] == 0
            assert rows_of(ahead.next_batch()) == rows_of(plain.next_batch())
            state = ahead.state()
        time.sleep(0.05)  # the thread works on; the state must not
        assert ahead.state() == state
        assert ahead.fingerprint() == plain.fingerprint()
        rows = [rows_of(plain.next_batch()) for _ in range(3)]
        assert [rows_of(ahead.next_batch()) for _ in range(3)] == rows
        ahead.restore(state)
        assert ahead.state() == state
        assert [rows_of(ahead.next_batch()) for _ in range(3)] == rows
    plain.close()


def test_work_goes_on_while_the_owner_is_busy_but_not_without_bound() -> None:
    made: list[int] = []
    third = threading.Event()

    def numbers() -> Iterator[int]:
        for item in range(50):
            made.append(item)
            if item == 3:
                third.set()
            yield item

    items = Background(numbers(), ahead=2)
    assert next(items) == 0
    # Two wait in the queue, the next is in the thread's hands: made without being asked for.
    assert third.wait(20)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3]
    assert list(items) == list(range(1, 50))


def test_errors_come_in_their_turn_and_stay() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise DataError("row 2 is bad")

    before = alive()
    items = Background(failing(), ahead=4)
    assert next(items) == 1
    for _ in range(2):
        with pytest.raises(DataError, match="row 2 is bad"):
            next(items)
    assert settle(before) == before


def test_no_thread_outlives_its_owner(stream: TextData) -> None:
    before = alive()
    closed = Prefetched(loader(stream))
    closed.next_batch()
    assert alive() == before + 2
    closed.close()
    assert settle(before) == before
    forgotten = Prefetched(loader(stream))
    forgotten.next_batch()
    del forgotten
    gc.collect()
    assert settle(before) == before
    items = Background(iter(range(9)), ahead=1)
    items.close()
    with pytest.raises(Closed):
        next(items)


def test_closing_does_not_wait_for_a_full_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_JOIN_SECONDS", 1000.0)
    data = write_lines(tmp_path / "t.txt", sentences(30_000))
    stream = TextData(paths=data.paths, split="line", stream=True, shuffle_rows=10**6)
    ahead = Prefetched(loader(stream))

    def wait_for_a_batch() -> None:
        with pytest.raises(Closed):
            ahead.next_batch()
        refused.append(True)

    refused: list[bool] = []
    thread = threading.Thread(target=wait_for_a_batch)
    thread.start()
    time.sleep(0.2)
    started = time.perf_counter()
    ahead.close()
    assert time.perf_counter() - started < 500, "it waited for the thread's time limit"
    thread.join(300)
    assert refused == [True]


_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from qwen2kit.config.data_tree import TextData
from qwen2kit.data.background import Prefetched
from qwen2kit.data.loader import Loader
from tests.unit.data.make_data import opener
data = TextData(paths=(sys.argv[2],), split="line", stream=True, shuffle_rows=20)
ahead = Prefetched(Loader(opener().source(data), batch_rows=4))
print("ready", flush=True)
while True:
    ahead.next_batch()
    if len(sys.argv) > 3:
        raise SystemExit(3)
"""


@pytest.mark.parametrize("interrupt", [True, False])
def test_the_process_ends_at_once(interrupt: bool, stream: TextData) -> None:
    extra = [] if interrupt else ["exit"]
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(ROOT), stream.paths[0], *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    if interrupt:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    if interrupt:
        assert errors.rstrip().endswith("KeyboardInterrupt")
    else:
        assert (process.returncode, errors) == (3, "")
