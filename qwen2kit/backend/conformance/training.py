"""Cases about training: loss, gradient, AdamW, accumulation, state on disk, broken steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from qwen2kit.backend.conformance.case import Case, require, require_close, require_raises
from qwen2kit.backend.conformance.models import (
    DENSE,
    TIED,
    TOLERANCE,
    UNTIED,
    reference_logits,
    tokens,
    weights,
)
from qwen2kit.backend.conformance.training_batches import (
    PLAIN,
    packed_batch,
    plain_batch,
    reference_loss,
    trainable,
)
from qwen2kit.backend.plan import AdamWPlan
from qwen2kit.backend.protocol import Backend, TrainableModel
from qwen2kit.backend.values import Capabilities, StepMetrics, TokenBatch
from qwen2kit.errors import TrainingError, WeightError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.reference import ReferenceModel
from qwen2kit.spec.schema import EMBED_TOKENS, FINAL_NORM, schema_by_name
from qwen2kit.weights.source import MemorySource
from qwen2kit.weights.tensor import from_float32


def _values(model: TrainableModel) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.float32().copy() for name, tensor in model.export()}


def _require_same(a: TrainableModel, b: TrainableModel, what: str) -> None:
    for (name, ours), theirs in zip(_values(a).items(), _values(b).values(), strict=True):
        require(np.array_equal(ours, theirs, equal_nan=True), f"{what}: {name} differs")


def _loss(backend: Backend, spec: ModelSpec) -> None:
    model = trainable(backend, spec, micro_batch_rows=3, loss_chunk_tokens=10)
    reference = ReferenceModel(spec, weights(spec))
    for what, batch in (("plain", plain_batch()), ("packed", packed_batch())):
        expected = reference_loss(reference, batch)
        for metrics in (model.loss(batch), model.train_step(batch, 0.0)):
            _require_metrics(what, metrics, batch, expected)
        require(model.loss(batch).grad_norm == 0, "loss() reports a gradient norm")


def _require_metrics(what: str, metrics: StepMetrics, batch: TokenBatch, expected: float) -> None:
    require(
        abs(metrics.loss - expected) <= TOLERANCE,
        f"{what} loss {metrics.loss:.6f}, expected {expected:.6f}",
    )
    real, supervised = int((batch.documents >= 0).sum()), int((batch.labels >= 0).sum())
    require(metrics.tokens == real, f"{what}: tokens {metrics.tokens}, expected {real}")
    require(
        metrics.supervised_tokens == supervised,
        f"{what}: supervised_tokens {metrics.supervised_tokens}, expected {supervised}",
    )
    require(not metrics.skipped, f"{what}: a sound step was skipped")


def _still_infers(backend: Backend) -> None:
    model = trainable(backend)
    before = model.logits(tokens(12))
    expected = reference_logits(UNTIED, tokens(12))
    require_close("logits of a trainable model", before, expected, TOLERANCE)
    model.train_step(plain_batch(), 1e-2)
    moved = float(np.abs(model.logits(tokens(12)) - before).max())
    require(moved > TOLERANCE, "logits do not follow a training step")


def _zero_rate(backend: Backend) -> None:
    model = trainable(backend, optimizer=AdamWPlan(weight_decay=0.1))
    model.train_step(plain_batch(), 0.0)
    _require_same(model, trainable(backend), "a step with learning rate 0")


def _gradient(backend: Backend, spec: ModelSpec) -> None:
    """A huge epsilon turns AdamW's first step into plain gradient descent; the step it takes is
    compared with central differences of the reference loss along it."""
    eps, rate = 1e6, 0.05
    model = trainable(backend, spec, optimizer=replace(PLAIN, eps=eps), micro_batch_rows=2)
    batch = packed_batch()
    reported = model.train_step(batch, rate * eps).grad_norm
    start = weights(spec)
    gradient = {
        name: (start.read(name).float32() - after) / rate for name, after in _values(model).items()
    }
    norm = float(np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient.values())))
    require(
        abs(norm - reported) <= 0.01 * norm, f"grad_norm {reported:.5f}, the step says {norm:.5f}"
    )
    size = 2e-3 / norm

    def loss_at(scale: float) -> float:
        moved = {
            name: from_float32(start.read(name).float32() + np.float32(scale) * g, "float32")
            for name, g in gradient.items()
        }
        return reference_loss(ReferenceModel(spec, MemorySource(moved)), batch)

    slope = (loss_at(size) - loss_at(-size)) / (2 * size)
    require(
        abs(slope - norm**2) <= 0.02 * norm**2,
        f"slope along the gradient {slope:.5f}, expected its squared norm {norm**2:.5f}",
    )


def _clipping(backend: Backend) -> None:
    eps, rate, limit = 1e6, 0.05, 0.1
    optimizer = replace(PLAIN, eps=eps, max_grad_norm=limit)
    model = trainable(backend, optimizer=optimizer)
    metrics = model.train_step(plain_batch(), rate * eps)
    require(metrics.grad_norm > limit, "grad_norm is not the norm before clipping")
    squares = [
        ((weights(UNTIED).read(name).float32().astype(np.float64) - after) ** 2).sum()
        for name, after in _values(model).items()
    ]
    step = float(np.sqrt(sum(squares))) / rate
    require(abs(step - limit) <= 0.02 * limit, f"clipped to {step:.4f}, expected {limit}")


def _decay(backend: Backend) -> None:
    """Decoupled decay: one step differs by ``lr * weight_decay * w`` on matrices only."""
    rate, decay = 1e-2, 0.5
    without, with_decay = (
        trainable(backend),
        trainable(backend, optimizer=replace(PLAIN, weight_decay=decay)),
    )
    for model in (without, with_decay):
        model.train_step(plain_batch(), rate)
    params, after = schema_by_name(UNTIED), _values(with_decay)
    for name, plain in _values(without).items():
        start = weights(UNTIED).read(name).float32()
        expected = plain - rate * decay * start * params[name].decays
        require_close(f"{name} after decay", after[name], expected.astype(np.float64), 1e-5)


def _accumulation(backend: Backend) -> None:
    batch = packed_batch()
    found = {}
    for rows in (1, 3, 4):
        model = trainable(backend, optimizer=replace(PLAIN, eps=1e-2), micro_batch_rows=rows)
        metrics = model.train_step(batch, 1e-2)
        found[rows] = (metrics.loss, metrics.grad_norm, _values(model))
    for rows in (1, 3):
        for index, what in enumerate(("loss", "grad_norm")):
            ours, whole = float(found[rows][index]), float(found[4][index])  # type: ignore[arg-type]
            close = abs(ours - whole) <= 1e-4 * max(1.0, whole)
            require(close, f"{what} is {ours:.6f} in micro-batches of {rows}, {whole:.6f} at once")
        for name, values in found[rows][2].items():
            want = found[4][2][name].astype(np.float64)
            require_close(f"{name} in micro-batches of {rows}", values, want, 1e-4)


def _learns(backend: Backend, spec: ModelSpec) -> None:
    model = trainable(backend, spec, optimizer=AdamWPlan())
    losses = [model.train_step(plain_batch(), 5e-3).loss for _ in range(30)]
    require(
        losses[-1] < 0.3 * losses[0], f"loss went from {losses[0]:.3f} to {losses[-1]:.3f} only"
    )


def _init(backend: Backend, spec: ModelSpec) -> None:
    models = [trainable(backend, spec) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init(seed)
    _require_same(models[0], models[1], "two initialisations with one seed")
    values, other = _values(models[0]), _values(models[2])
    require(not np.array_equal(values[EMBED_TOKENS], other[EMBED_TOKENS]), "the seed is ignored")
    for name, param in schema_by_name(spec).items():
        if param.init != "normal":
            require((values[name] == (param.init == "ones")).all(), f"{name} is not {param.init}")
            continue
        spread, mean = float(values[name].std()), float(abs(values[name].mean()))
        slack = 5 * spec.initializer_range / np.sqrt(param.size)
        require(abs(spread - spec.initializer_range) < slack, f"{name}: deviation {spread:.4f}")
        require(mean < slack, f"{name}: mean {mean:.5f}")


@contextmanager
def _saved(model: TrainableModel) -> Iterator[Path]:
    with TemporaryDirectory() as directory:
        model.save_state(Path(directory)).wait()
        yield Path(directory)


def _resume(backend: Backend) -> None:
    model = trainable(backend, optimizer=AdamWPlan())
    for seed in range(3):
        model.train_step(plain_batch(seed), 1e-2)
    with _saved(model) as directory:
        resumed = trainable(backend, source=weights(UNTIED, seed=5), optimizer=AdamWPlan())
        resumed.restore_state(directory)
    _require_same(model, resumed, "after restoring")
    for seed in range(3, 6):
        ours, theirs = (m.train_step(plain_batch(seed), 1e-2) for m in (resumed, model))
        same = (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
        require(same, f"step {seed} after resuming differs: {ours} against {theirs}")
    _require_same(model, resumed, "three steps after resuming")


def _refuses_wrong_state(backend: Backend) -> None:
    model = trainable(backend)
    with TemporaryDirectory() as empty:
        require_raises(WeightError, lambda: model.restore_state(Path(empty)), "empty directory")
    with _saved(model) as directory:
        other = trainable(backend, TIED)
        require_raises(WeightError, lambda: other.restore_state(directory), "another model's state")
    with _saved(model) as directory:
        files = [path for path in directory.rglob("*.safetensors") if path.is_file()]
        require(files, "save_state wrote no safetensors file")
        for path in files:
            path.write_bytes(path.read_bytes()[:-8])
        require_raises(WeightError, lambda: model.restore_state(directory), "truncated state")


def _broken_weights() -> MemorySource:
    source = weights(UNTIED)
    bad = np.full(UNTIED.hidden_size, np.nan, dtype=np.float32)
    tensors = {name: source.read(name) for name in source.names()}
    return MemorySource(tensors | {FINAL_NORM: from_float32(bad, "float32")})


def _non_finite(backend: Backend) -> None:
    broken = _broken_weights()
    skipping = trainable(backend, source=broken, non_finite="skip")
    metrics = skipping.train_step(plain_batch(), 1e-2)
    require(metrics.skipped, "a step with NaN loss is not reported as skipped")
    _require_same(skipping, trainable(backend, source=broken), "a skipped step")
    raising = trainable(backend, source=broken, non_finite="raise")
    require_raises(TrainingError, lambda: raising.train_step(plain_batch(), 1e-2), "NaN loss")


def _trains(has: Capabilities) -> bool:
    return has.trains


CASES = tuple(
    Case(f"train/{name}", check, _trains)
    for name, check in (
        ("loss-tied", partial(_loss, spec=TIED)),
        ("loss-untied", partial(_loss, spec=UNTIED)),
        ("loss-yarn", partial(_loss, spec=DENSE["yarn"])),
        ("still-infers", _still_infers),
        ("zero-learning-rate", _zero_rate),
        ("gradient-tied", partial(_gradient, spec=TIED)),
        ("gradient-untied", partial(_gradient, spec=UNTIED)),
        ("clipping", _clipping),
        ("decoupled-weight-decay", _decay),
        ("accumulation", _accumulation),
        ("learns-tied", partial(_learns, spec=TIED)),
        ("learns-untied", partial(_learns, spec=UNTIED)),
        ("init-tied", partial(_init, spec=TIED)),
        ("init-untied", partial(_init, spec=UNTIED)),
        ("resume", _resume),
        ("refuses-wrong-state", _refuses_wrong_state),
        ("non-finite", _non_finite),
    )
)
