"""One conformance case, how it is run, and the report over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from unittest import SkipTest

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.protocol import Backend
from qwen2kit.backend.values import Capabilities
from qwen2kit.errors import ConfigError, Qwen2KitError

Outcome = Literal["passed", "failed", "skipped", "xfailed", "xpassed"]
Needs = Callable[[Capabilities], bool]


class ConformanceFailure(AssertionError):
    """A backend does not do what the protocol says."""


@dataclass(frozen=True, slots=True)
class Case:
    """One requirement of the protocol.

    Attributes:
        name: stable identifier, ``area/what``.
        check: raises an exception if the backend does not meet it.
        needs: whether the capabilities call for this case; None means always.
    """

    name: str
    check: Callable[[Backend], None]
    needs: Needs | None = None

    def applies(self, backend: Backend) -> bool:
        """Whether ``backend`` announces what this case is about."""
        return self.needs is None or self.needs(backend.capabilities())

    def run(self, backend: Backend) -> None:
        """Check ``backend``.

        Raises:
            SkipTest: the backend does not announce the capability (pytest reports a skip).
            AssertionError: it does not conform.
        """
        if not self.applies(backend):
            raise SkipTest(f"{backend.name} does not announce what {self.name} needs")
        self.check(backend)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """Outcome of one case, with the failure message or the reason of an expected failure."""

    name: str
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ConformanceReport:
    """Outcomes of all cases of one backend."""

    backend: str
    results: tuple[CaseResult, ...]

    @property
    def ok(self) -> bool:
        """True if nothing failed and no expected failure passed."""
        return not self.names("failed") and not self.names("xpassed")

    def names(self, outcome: Outcome) -> tuple[str, ...]:
        """Names of the cases that ended with ``outcome``."""
        return tuple(result.name for result in self.results if result.outcome == outcome)

    def text(self) -> str:
        """One line per case and a closing count, for people."""
        lines = [
            f"{result.outcome:8} {result.name}" + (f": {result.detail}" if result.detail else "")
            for result in self.results
        ]
        counts = Counter(result.outcome for result in self.results)
        summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        return "\n".join([*lines, f"{self.backend}: {summary}"])


def run_cases(
    cases: Sequence[Case], backend: Backend, xfail: Mapping[str, str]
) -> ConformanceReport:
    """Run ``cases`` one after the other; see `run_conformance`."""
    unknown = set(xfail) - {case.name for case in cases}
    if unknown:
        raise ConfigError(f"xfail names no conformance case: {', '.join(sorted(unknown))}")
    return ConformanceReport(
        backend.name, tuple(_run_one(case, backend, xfail.get(case.name)) for case in cases)
    )


def _run_one(case: Case, backend: Backend, expected: str | None) -> CaseResult:
    try:
        case.run(backend)
    except SkipTest:
        return CaseResult(case.name, "skipped")
    except Exception as error:  # a backend may raise anything; all of it is a failure
        detail = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if expected is not None:
            return CaseResult(case.name, "xfailed", expected)
        return CaseResult(case.name, "failed", detail)
    if expected is not None:
        return CaseResult(case.name, "xpassed", f"expected to fail: {expected}")
    return CaseResult(case.name, "passed")


def require(condition: object, message: str) -> None:
    """Fail with ``message`` unless ``condition`` is true."""
    if not condition:
        raise ConformanceFailure(message)


def require_close(
    what: str, found: NDArray[np.floating], expected: NDArray[np.floating], tolerance: float
) -> None:
    """Fail unless shapes agree and no element is off by more than ``tolerance``."""
    require(
        found.shape == expected.shape,
        f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}",
    )
    require(np.isfinite(found).all(), f"{what}: not finite")
    worst = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0))
    require(worst <= tolerance, f"{what}: off by {worst:.3g}, allowed {tolerance:.3g}")


def require_raises(error: type[Qwen2KitError], action: Callable[[], object], what: str) -> None:
    """Fail unless ``action`` raises ``error`` with a one-line message."""
    try:
        action()
    except error as caught:
        require(str(caught) and "\n" not in str(caught), f"{what}: message is not one line")
        return
    except Exception as other:
        raise ConformanceFailure(
            f"{what}: expected {error.__name__}, got {type(other).__name__}: {other}"
        ) from other
    raise ConformanceFailure(f"{what}: accepted, expected {error.__name__}")
