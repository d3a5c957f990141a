"""Checkpoints: atomic, checked, pruned, written by many in the background; damage, full disks."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from qwen2kit.backend.protocol import Saved, Saving
from qwen2kit.errors import PeerError, TrainingError, WeightError
from qwen2kit.train.checkpoints import CheckpointStore
from tests.unit.train.thread_team import Member, play

NO_READ: Callable[..., None] = lambda path, state: None  # noqa: E731


def writer(text: str) -> Callable[[Path], Saving]:
    def write(directory: Path) -> Saved:
        (directory / "model.bin").write_text(text)
        return Saved(("model.bin",))

    return write


def save(store: CheckpointStore, step: int, value: int, write: Callable[[Path], Saving]) -> Path:
    store.begin(step, {"value": value}, write)
    store.finish()
    return store.directory / f"step-{step:08d}"


def saved(tmp_path: Path, count: int = 3, keep: int = 2) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep)
    for step in range(1, count + 1):
        save(store, step * 10, step, writer(f"weights {step}"))
    return store


def test_newest_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    store = saved(tmp_path)
    assert [path.name for path in store.paths()] == ["step-00000020", "step-00000030"]
    read: list[str] = []
    restored = store.restore(lambda d, state: read.append((d / "model.bin").read_text()))
    assert restored is not None
    assert read == ["weights 3"]
    assert (restored.state["step"], restored.state["value"]) == (30, 3)
    assert restored.warnings == ()
    assert not list(store.directory.glob(".*"))


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent", 2).restore(NO_READ) is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: flip(d / "model.bin"),
        lambda d: (d / "model.bin").unlink(),
        lambda d: (d / "model.bin").write_text("weights"),
        lambda d: (d / "state.json").unlink(),
        lambda d: (d / "state.json").write_text('{"step": 30'),
        lambda d: (d / "state.json").write_text("[]"),
        lambda d: edit(d / "state.json", step=31),
        lambda d: (d / "files-00000.json").unlink(),
        lambda d: edit(d / "files-00000.json", absent="crc32:00000000"),
    ],
)
def test_a_damaged_newest_falls_back_with_a_warning(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = saved(tmp_path)
    damage(store.paths()[-1])
    restored = store.restore(NO_READ)
    assert restored is not None
    assert restored.state["step"] == 20
    assert len(restored.warnings) == 1
    assert "step-00000030 is damaged" in restored.warnings[0]


def test_a_backend_that_refuses_the_newest_falls_back_too(tmp_path: Path) -> None:
    store = saved(tmp_path)

    def read(directory: Path, state: object) -> None:
        if directory.name.endswith("30"):
            raise WeightError("of another model")

    restored = store.restore(read)
    assert restored is not None
    assert restored.state["step"] == 20
    for path in store.paths():
        flip(path / "model.bin")
    with pytest.raises(TrainingError, match="no intact checkpoint"):
        store.restore(read)


def test_another_version_is_refused_in_one_line(tmp_path: Path) -> None:
    store = saved(tmp_path)
    edit(store.paths()[-1] / "state.json", schema_version=1)
    with pytest.raises(TrainingError, match=r"another version .* \(schema 1, this one reads 2\)"):
        store.restore(NO_READ)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("late", [False, True])
def test_a_failed_save_leaves_the_previous_ones(reason: int, late: bool, tmp_path: Path) -> None:
    store = saved(tmp_path)

    class Broken(Saved):
        def wait(self) -> tuple[str, ...]:
            raise OSError(reason, "no luck")

    def full(directory: Path) -> Saving:
        (directory / "model.bin").write_text("half")
        return Broken(()) if late else Saved(Broken(()).wait())

    with pytest.raises(TrainingError) as caught:
        save(store, 40, 4, full)
    message = str(caught.value)
    assert "step 40" in message
    assert "step-00000030 is intact" in message
    assert "\n" not in message
    assert ("no space left" in message) == (reason == errno.ENOSPC)
    assert [path.name for path in store.paths()] == ["step-00000020", "step-00000030"]
    assert not list(store.directory.glob(".*"))


def test_a_failure_that_is_no_exception_is_a_failure_too(tmp_path: Path) -> None:
    store = saved(tmp_path)

    class Broken(Saved):
        def wait(self) -> tuple[str, ...]:
            raise BaseException("as torch's checkpoints do")

    with pytest.raises(RuntimeError, match="as torch's checkpoints do"):
        save(store, 40, 4, lambda directory: Broken(()))
    assert [path.name for path in store.paths()] == ["step-00000020", "step-00000030"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    store = saved(tmp_path)
    save(store, 30, 9, writer("again"))
    restored = store.restore(NO_READ)
    assert restored is not None
    assert restored.state["value"] == 9


WIDE = 18
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def interrupted(work: Callable[[], object], number: int, *, kill: bool) -> int:
    """Do ``work`` in a process that is killed before its change ``number`` of files or directories,
    or in which that change fails; its exit code, which is 9 if it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = count(number, -1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in CHANGES and next(left) == 0:
            if kill:
                os._exit(9)
            raise OSError(errno.ENOSPC, "no luck")

    sys.addaudithook(hook)
    try:
        work()
        os._exit(0)
    except TrainingError:
        os._exit(1)
    finally:
        os._exit(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kill", [True, False])
def test_old_or_new_is_whole_wherever_a_replacement_ends(kill: bool, tmp_path: Path) -> None:
    codes, found = [], []
    for number in range(WIDE):
        store = saved(tmp_path / str(number), count=1)
        codes.append(
            interrupted(lambda s=store: save(s, 10, 9, writer("again")), number, kill=kill)
        )
        texts: list[str] = []
        restored = store.restore(lambda d, state, t=texts: t.append((d / "model.bin").read_text()))
        assert restored is not None
        assert restored.warnings == ()
        assert (restored.state["value"], *texts) in ((1, "weights 1"), (9, "again"))
        found.append(texts[0])
        save(store, 20, 2, writer("next"))
        assert [path.name for path in store.paths()] == ["step-00000010", "step-00000020"]
        assert not list(store.directory.glob(".*"))
    done = codes.index(0) if kill else len(codes) - codes[::-1].index(1)
    assert 8 < done < WIDE
    assert set(codes[:done]) <= ({9} if kill else {0, 1})
    assert set(codes[done:]) == {0}
    assert {"weights 1", "again"} == set(found)
    assert set(found[done:]) == {"again"}


def test_a_partial_directory_of_a_crash_is_ignored_and_swept(tmp_path: Path) -> None:
    store = saved(tmp_path)
    for step in (35, 40):
        partial = store.directory / f".step-{step:08d}.partial"
        partial.mkdir()
        (partial / "junk").write_text("x")
    assert len(store.paths()) == 2
    final = save(store, 40, 4, writer("w"))
    names = sorted(path.name for path in final.iterdir())
    assert names == ["files-00000.json", "model.bin", "state.json"]
    assert not list(store.directory.glob(".*"))


def test_a_damaged_newer_one_does_not_push_out_intact_ones(tmp_path: Path) -> None:
    store = saved(tmp_path)
    flip(store.paths()[-1] / "model.bin")
    save(store, 25, 5, writer("w"))
    names = [path.name for path in store.paths()]
    assert names == ["step-00000020", "step-00000025", "step-00000030"]


class Slow:
    """A save that ends when it is told to."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path, self.ready = directory / name, threading.Event()

    def done(self) -> bool:
        return self.ready.is_set()

    def wait(self) -> tuple[str, ...]:
        self.ready.wait(20)
        self.path.write_text("late")
        return (self.path.name,)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    slow: list[Slow] = []

    def write(directory: Path) -> Slow:
        slow.append(Slow(directory, "model.bin"))
        return slow[0]

    store.begin(1, {"value": 1}, write)
    assert (store.saving, store.busy, store.paths()) == (True, True, [])
    slow[0].ready.set()
    store.begin(2, {"value": 2}, writer("two"))  # waits for the first
    assert [path.name for path in store.paths()] == ["step-00000001"]
    assert (store.paths()[0] / "model.bin").read_text() == "late"
    store.finish()
    assert (store.saving, store.busy, len(store.paths())) == (False, False, 2)


def shard_writer(member: Member) -> Callable[[Path], Saving]:
    def write(directory: Path) -> Saved:
        name = f"shard-{member.rank}.bin"
        (directory / name).write_text(f"{member.rank}" * 100)
        return Saved((name,))

    return write


def test_many_processes_write_one_checkpoint(tmp_path: Path) -> None:
    def part(member: Member) -> list[str]:
        store = CheckpointStore(tmp_path, 1, member)
        for step in (1, 2):
            save(store, step, step, shard_writer(member))
        return [path.name for path in store.paths()]

    assert play(3, part) == [["step-00000002"]] * 3
    assert sorted(path.name for path in (tmp_path / "step-00000002").iterdir()) == [
        *(f"files-0000{rank}.json" for rank in range(3)),
        *(f"shard-{rank}.bin" for rank in range(3)),
        "state.json",
    ]
    for world in (1, 2, 5):  # any number may read it

        def read(member: Member) -> int:
            restored = CheckpointStore(tmp_path, 1, member).restore(NO_READ)
            assert restored is not None
            return int(restored.state["value"])

        assert play(world, read) == [2] * world


@pytest.mark.parametrize("rank", [0, 2])
def test_all_agree_on_the_checkpoint_to_restore(rank: int, tmp_path: Path) -> None:
    def write(member: Member) -> None:
        for step in (1, 2):
            save(CheckpointStore(tmp_path, 2, member), step, step, shard_writer(member))

    play(3, write)
    flip(tmp_path / "step-00000002" / f"shard-{rank}.bin")

    def read(member: Member) -> tuple[int, int]:
        restored = CheckpointStore(tmp_path, 2, member).restore(NO_READ)
        assert restored is not None
        return restored.state["step"], len(restored.warnings)

    assert play(3, read) == [(1, 1)] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_stops_all_and_leaves_nothing(rank: int, tmp_path: Path) -> None:
    def part(member: Member) -> None:
        store = CheckpointStore(tmp_path, 2, member)
        save(store, 1, 1, shard_writer(member))

        def full(directory: Path) -> Saving:
            if member.rank == rank:
                raise OSError(errno.ENOSPC, "no luck")
            return shard_writer(member)(directory)

        save(store, 2, 2, full)

    outcome = play(2, part)
    assert type(outcome[1 - rank]) is PeerError
    assert type(outcome[rank]) is TrainingError
    assert "no space left on the disk; step-00000001 is intact" in str(outcome[rank])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
