"""Errors among several processes: all stop, one speaks."""

from __future__ import annotations

import pytest

from qwen2kit.backend.processes import SingleProcess
from qwen2kit.errors import ConfigError, MissingExtra, PeerError
from qwen2kit.train.agreement import on_first, settle, together
from tests.unit.train.thread_team import Member, play


def failing_on(*ranks: int):  # type: ignore[no-untyped-def]
    def part(member: Member) -> int:
        def work() -> int:
            if member.rank in ranks:
                raise ConfigError("no luck")
            return member.rank

        return together(member, work)

    return part


def test_success_gives_everybody_their_own_result() -> None:
    assert play(3, failing_on()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("ranks", "speaker", "message"),
    [
        ((0,), 0, "no luck"),
        ((2,), 2, "process 2: no luck"),
        ((1, 2), 1, "process 1: no luck"),
        ((0, 1, 2), 0, "no luck"),
    ],
)
def test_one_speaks_and_all_stop(ranks: tuple[int, ...], speaker: int, message: str) -> None:
    outcome = play(3, failing_on(*ranks))
    for rank, error in enumerate(outcome):
        if rank == speaker:
            assert type(error) is ConfigError
            assert str(error) == message
        else:
            assert type(error) is PeerError


def test_other_exceptions_stop_all_too() -> None:
    def part(member: Member) -> None:
        settle(member, KeyError("bug") if member.rank == 1 else None)

    assert [type(error) for error in play(2, part)] == [PeerError, KeyError]


def test_only_the_first_works_and_all_get_its_result() -> None:
    worked: list[int] = []

    def part(member: Member) -> str:
        def work() -> str:
            worked.append(member.rank)
            return "runs/x"

        return on_first(member, work)

    assert play(3, part) == ["runs/x"] * 3
    assert worked == [0]


def test_alone_the_error_is_the_error() -> None:
    error = MissingExtra("torch", "torch")
    with pytest.raises(MissingExtra) as caught:
        settle(SingleProcess(), error)
    assert caught.value is error
