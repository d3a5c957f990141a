"""Cases about one forward pass without a cache: logits and hidden states."""

from __future__ import annotations

from functools import partial

import numpy as np

from qwen2kit.backend.conformance.case import Case, require, require_close
from qwen2kit.backend.conformance.models import (
    DENSE,
    TOLERANCE,
    UNTIED,
    WINDOW,
    loaded,
    reference_logits,
    tokens,
    weights,
)
from qwen2kit.backend.protocol import Backend
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.reference import ReferenceModel


def _logits(backend: Backend, spec: ModelSpec) -> None:
    model = loaded(backend, spec)
    for length in (1, 2, 33, 90):
        ids = tokens(length, seed=length)
        found = model.logits(ids)
        require(found.dtype == np.float32, f"logits are {found.dtype}, not float32")
        what = f"logits of {length} tokens"
        require_close(what, found, reference_logits(spec, ids), TOLERANCE)


def _repeatable(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    first = model.logits(tokens(20)).copy()
    model.logits(tokens(30, seed=5))
    require(np.array_equal(first, model.logits(tokens(20))), "the same call gave other logits")


def _causal(backend: Backend) -> None:
    model = loaded(backend, UNTIED)
    whole, part = model.logits(tokens(24)), model.logits(tokens(24)[:10])
    require_close("logits of a prefix", part, whole[:10].astype(np.float64), 1e-4)


def _hidden_states(backend: Backend, spec: ModelSpec) -> None:
    ids = tokens(19)
    found = loaded(backend, spec).hidden_states(ids)
    require(found.dtype == np.float32, f"hidden states are {found.dtype}, not float32")
    expected = ReferenceModel(spec, weights(spec)).hidden_states(ids)
    require(found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}")
    for index, (ours, want) in enumerate(zip(found, expected, strict=True)):
        require_close(f"hidden state {index}", ours, want, TOLERANCE)


CASES = (
    *(Case(f"logits/{name}", partial(_logits, spec=spec)) for name, spec in DENSE.items()),
    Case("logits/sliding-window", partial(_logits, spec=WINDOW), lambda has: has.sliding_window),
    Case("logits/repeatable", _repeatable),
    Case("logits/causal", _causal),
    Case("hidden-states/tied", partial(_hidden_states, spec=DENSE["tied"])),
    Case("hidden-states/untied", partial(_hidden_states, spec=DENSE["untied"])),
)
