"""Stage evaluation data for machines without network: Hub data sets as ``DIR/org/name``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen2kit.errors import ConfigError
from qwen2kit_evals.local_data import LocalData


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """One data set after `fetch_data`.

    Attributes:
        name: ``org/name``.
        state: ``fetched``, ``present`` (left as it was) or ``absent``.
        problem: why it is absent, or cannot be read; empty if all is well.
    """

    name: str
    state: str
    problem: str = ""


def fetch_data(names: Sequence[str], to: Path) -> Iterator[Fetched]:
    """Download each of ``names`` that ``to`` lacks.

    A data set appears under its name once it is complete; an interrupted download goes on the next
    time. A failure is reported and does not stop the others.

    Raises:
        ConfigError: the Hub client is set offline.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("fetch needs the network, but HF_HUB_OFFLINE is set; unset it")
    to.mkdir(parents=True, exist_ok=True)
    return (_fetch(name, to) for name in names)


def _fetch(name: str, to: Path) -> Fetched:
    place = to / name
    state = "present"
    if not place.is_dir():
        if problem := _download(name, place):
            return Fetched(name=name, state="absent", problem=problem)
        state = "fetched"
    return Fetched(name=name, state=state, problem=_unreadable(name, to))


def _download(name: str, place: Path) -> str:
    """Bring ``name`` to ``place``; returns what went wrong."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    part = place.with_name(f".{place.name}.part")
    try:
        snapshot_download(name, repo_type="dataset", local_dir=part)
    except GatedRepoError:
        return f"gated; accept its terms at https://huggingface.co/datasets/{name} and log in"
    except RepositoryNotFoundError:
        return "no such data set, or it is private"
    except Exception as error:  # whatever the network does to the client
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    part.rename(place)
    return ""


def _unreadable(name: str, to: Path) -> str:
    try:
        LocalData(to).configs(name)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        return f"downloaded, but cannot be read: {type(error).__name__}: {first}"
    return ""
