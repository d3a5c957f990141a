"""The conformance suite: what every backend must compute, runnable by any third party.

Needs NumPy only. Under pytest::

    import pytest
    from qwen2kit.backend.conformance import CASES

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_conformance(case):
        case.run(MyBackend())

Cases that need a capability the backend does not announce are skipped. Without pytest use
`run_conformance`, or ``python -m qwen2kit.backend.conformance NAME`` for a registered backend.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwen2kit.backend.conformance import forward, generation, loading, scoring, slots, training
from qwen2kit.backend.conformance.case import Case, ConformanceReport, run_cases
from qwen2kit.backend.protocol import Backend

CASES: tuple[Case, ...] = (
    *loading.CASES,
    *forward.CASES,
    *scoring.CASES,
    *slots.CASES,
    *generation.CASES,
    *training.CASES,
)

__all__ = ["CASES", "Case", "ConformanceReport", "run_conformance"]


def run_conformance(
    backend: Backend, *, xfail: Mapping[str, str] | None = None
) -> ConformanceReport:
    """Run every case and collect the outcomes; nothing is raised for a failing case.

    Args:
        backend: the backend under test.
        xfail: case name -> reason, for cases that are known to fail. A case that is listed and
            passes counts as a failure, so that the list stays true.

    Raises:
        ConfigError: ``xfail`` names a case that does not exist.
    """
    return run_cases(CASES, backend, xfail or {})
