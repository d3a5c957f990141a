"""A stranger's backend passes the suite through the public door; broken ones fail it in place."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen2kit.backend.conformance import CASES, Case, run_conformance
from qwen2kit.backend.conformance.case import run_cases
from qwen2kit.backend.protocol import (
    Capabilities,
    LoadReport,
    Score,
    ScoreRequest,
    TokenIds,
)
from qwen2kit.backend.registry import available, get
from qwen2kit.backend.slots import Edit, Feed, Shortlist, Slots
from qwen2kit.engine.host_logits import HostLogits
from qwen2kit.engine.recompute import RecomputingSlots
from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.spec.schema import schema
from qwen2kit.weights.source import MemorySource, WeightSource
from qwen2kit.weights.tensor import HostTensor
from tests.unit.backend.third_party_backend import NumpyBackend, NumpyModel

BY_NAME = {case.name: case for case in CASES}
APPLICABLE = [case for case in CASES if case.applies(NumpyBackend())]


@pytest.mark.parametrize("case", APPLICABLE, ids=lambda case: case.name)
def test_numpy_backend_conforms(case: Case) -> None:
    case.run(NumpyBackend())


@pytest.fixture
def _registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``pip install`` of a third-party distribution leaves behind."""
    info = tmp_path / "acme_qwen2kit_numpy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-qwen2kit-numpy\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[qwen2kit.backends]\n"
        "numpy = tests.unit.backend.third_party_backend:NumpyBackend\n"
        "old = tests.unit.backend.test_conformance_third_party:OldBackend\n"
        "gone = acme_module_that_is_not_there:Backend\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


class OldBackend(NumpyBackend):
    name = "old"
    protocol_version = 0


@pytest.mark.usefixtures("_registered")
def test_entry_point_makes_it_available() -> None:
    assert "numpy" in {info.name for info in available()}
    assert get("numpy").name == "numpy"


@pytest.mark.usefixtures("_registered")
def test_registry_refuses_in_one_line() -> None:
    with pytest.raises(BackendError, match="speaks protocol 0"):
        get("old")
    with pytest.raises(BackendError, match="'gone' cannot be imported"):
        get("gone")
    with pytest.raises(BackendError, match=r"unknown backend 'nope'; registered: .*numpy"):
        get("nope")


class WrongLogits(NumpyModel):
    def logits(self, tokens: TokenIds) -> NDArray[np.float32]:
        return super().logits(tokens) + np.float32(0.01)


class NoBias(NumpyModel):
    def load(self, weights: WeightSource) -> LoadReport:
        def changed(name: str) -> HostTensor:
            tensor = weights.read(name)
            return replace(tensor, data=memoryview(bytes(tensor.nbytes)))

        tensors = {
            param.name: changed(param.name) if param.kind == "bias" else weights.read(param.name)
            for param in schema(self.spec)
        }
        return super().load(MemorySource(tensors))


class AcceptsAnything(NumpyModel):
    def load(self, weights: WeightSource) -> LoadReport:
        try:
            return super().load(weights)
        except ValueError:
            return LoadReport(tensors=0, bytes=0, seconds=0.0)


class MixedUpSlots(RecomputingSlots):
    """The classic batching bug: rows of a ragged batch are mixed up."""

    def feed(self, feeds: Sequence[Feed]) -> HostLogits:
        ragged = len(feeds) > 1 and len({len(feed.tokens) for feed in feeds}) > 1
        rows = super().feed(feeds)._rows
        return HostLogits(np.roll(rows, 1, axis=0) if ragged else rows)


class StickySlots(RecomputingSlots):
    """Never forgets what lay beyond ``start``."""

    def feed(self, feeds: Sequence[Feed]) -> HostLogits:
        kept = [replace(feed, start=len(self._held[feed.slot])) for feed in feeds]
        return super().feed(kept)


class LazySlots(RecomputingSlots):
    """Copies nothing."""

    def copy(self, source: int, target: int, length: int) -> None:
        super().copy(source, target, length)
        self._held[target] = [0] * length


class ForgetfulSlots(RecomputingSlots):
    """Loses the last token of a run."""

    def run_greedy(
        self, feeds: Sequence[Feed], limit: int | None, most: int | None = None
    ) -> Iterator[list[int]]:
        try:
            yield from super().run_greedy(feeds, limit, most)
        finally:
            for feed in feeds:
                self._held[feed.slot][-1] = 0


class CarelessLogits(HostLogits):
    """Chooses among padding rows, and takes the shortlist for the whole."""

    def greedy(self, limit: int | None) -> list[int]:
        return super().greedy(None)

    def shortlist(self, size: int, edits: Sequence[Edit]) -> Shortlist:
        short = super().shortlist(size, edits)
        total = np.log(np.exp(short.scores.astype(np.float64)).sum(axis=1))
        return replace(short, total=total)


class CarelessSlots(RecomputingSlots):
    """Gives such logits."""

    def feed(self, feeds: Sequence[Feed]) -> HostLogits:
        return CarelessLogits(super().feed(feeds)._rows)


def with_slots(slots: type[RecomputingSlots]) -> type[NumpyModel]:
    """A model that is sound but for its slots."""

    class Model(NumpyModel):
        def slots(self, count: int, capacity: int) -> Slots:
            return slots(self, count, capacity)

    Model.__name__ = slots.__name__
    return Model


class TransposedExport(NumpyModel):
    def export(self) -> Iterator[tuple[str, HostTensor]]:
        for name, tensor in super().export():
            square = len(tensor.shape) == 2 and tensor.shape[0] == tensor.shape[1]
            values = np.ascontiguousarray(tensor.float32().T) if square else tensor.float32()
            yield name, replace(tensor, data=values.reshape(-1).view(np.uint8).data)


class SumsAllLogprobs(NumpyModel):
    """Scores the context too."""

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        moved = [ScoreRequest(r.context[:1], r.context[1:] + r.continuation) for r in requests]
        return super().score(moved)


class NeverGreedy(NumpyModel):
    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        for index, score in super().score(requests):
            yield index, replace(score, is_greedy=False)


BROKEN: dict[type[NumpyModel], tuple[set[str], set[str]]] = {
    WrongLogits: ({"logits/tied", "logits/yarn"}, {"export/exact-tied", "hidden-states/tied"}),
    NoBias: ({"logits/untied", "hidden-states/tied", "export/exact-untied"}, {"load/report"}),
    AcceptsAnything: ({"load/refuses-wrong-weights"}, {"load/reload-replaces", "logits/tied"}),
    with_slots(MixedUpSlots): (
        {"slots/feed", "generate/ragged-batch", "generate/batch-is-single-greedy"},
        {"slots/greedy", "generate/greedy-untied", "generate/greedy-long-prompt"},
    ),
    with_slots(StickySlots): (
        {"slots/truncate"},
        {"slots/feed", "slots/copy", "generate/greedy-untied"},
    ),
    with_slots(LazySlots): (
        {"slots/copy", "generate/many-kinds-together"},
        {"slots/truncate", "generate/ragged-batch"},
    ),
    with_slots(ForgetfulSlots): ({"slots/run-greedy"}, {"slots/feed", "generate/greedy-untied"}),
    with_slots(CarelessSlots): (
        {"slots/greedy", "slots/shortlist", "generate/vocab-limit"},
        {"slots/run-greedy-to-the-end", "generate/greedy-untied"},
    ),
    TransposedExport: ({"export/exact-tied", "export/exact-untied"}, {"logits/tied"}),
    SumsAllLogprobs: ({"score/single-token", "score/shared-prefixes"}, {"score/no-requests"}),
    NeverGreedy: ({"score/greedy-flag"}, {"score/single-token"}),
}


@pytest.mark.parametrize("model", BROKEN, ids=lambda model: model.__name__)
def test_each_defect_fails_its_own_cases(model: type[NumpyModel]) -> None:
    backend = NumpyBackend()
    backend.model = model
    failing, passing = BROKEN[model]
    cases = [BY_NAME[name] for name in sorted(failing | passing)]
    report = run_cases(cases, backend, {})
    assert set(report.names("failed")) == failing
    assert set(report.names("passed")) == passing
    assert not report.ok


def test_training_is_not_asked_of_a_backend_that_does_not_train() -> None:
    assert not any(c.applies(NumpyBackend()) for c in CASES if c.name.startswith("train/"))
    assert BY_NAME["backend/refuses-training"].applies(NumpyBackend())


class Crashing(NumpyBackend):
    def capabilities(self) -> Capabilities:
        raise RuntimeError("driver\nexploded")


def test_report_of_a_crashing_backend() -> None:
    report = run_cases([BY_NAME["backend/identity"]], Crashing(), {})
    assert report.results[0].detail == "RuntimeError: driver exploded"
    assert report.text().endswith("numpy: 1 failed")


def test_expected_failures_are_strict() -> None:
    backend = NumpyBackend()
    backend.model = NeverGreedy
    cases = [BY_NAME["score/greedy-flag"], BY_NAME["score/no-requests"]]
    known = run_cases(cases, backend, {"score/greedy-flag": "not implemented"})
    assert known.ok
    assert known.names("xfailed") == ("score/greedy-flag",)
    stale = run_cases(cases, backend, {"score/no-requests": "stale entry"})
    assert not stale.ok
    assert stale.names("xpassed") == ("score/no-requests",)
    with pytest.raises(ConfigError, match="no conformance case: score/typo"):
        run_conformance(backend, xfail={"score/typo": "?"})
