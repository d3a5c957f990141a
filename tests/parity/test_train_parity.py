"""Training against transformers and torch.optim, and against itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen2kit.backend.plan import AdamWPlan, ExecutionPlan, TrainPlan
from qwen2kit.backend.protocol import TokenBatch, TrainableModel
from qwen2kit.backend.registry import get
from qwen2kit.errors import BackendError, TrainingError, WeightError
from qwen2kit.spec.hf import to_hf_config
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import schema
from qwen2kit.weights.source import MemorySource
from tests.conftest import random_weights, small_spec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROWS, LENGTH = 4, 24
IGNORED = -100


def plan(**settings: Any) -> ExecutionPlan:
    values = {"micro_batch_rows": 2, "loss_chunk_tokens": 17, **settings}
    return ExecutionPlan(device="cpu", dtype="float32", train=TrainPlan(**values))


def trainable(spec: ModelSpec, **settings: Any) -> TrainableModel:
    model = get("torch").compile(spec, plan(**settings))
    assert isinstance(model, TrainableModel)
    return model


def loaded(spec: ModelSpec, seed: int = 0, **settings: Any) -> TrainableModel:
    model = trainable(spec, **settings)
    model.load(random_weights(spec, seed))
    return model


def batches(spec: ModelSpec, count: int, seed: int = 0) -> Iterator[TokenBatch]:
    """Rows of one document each, of uneven lengths, with some labels masked."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens = rng.integers(0, spec.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
        lengths = rng.integers(LENGTH // 2, LENGTH + 1, ROWS)
        inside = np.arange(LENGTH) < lengths[:, None]
        chosen = inside & (rng.random((ROWS, LENGTH)) < 0.7)
        yield TokenBatch(
            tokens[:, :-1],
            np.where(chosen, tokens[:, 1:], IGNORED).astype(np.int32),
            np.where(inside, np.arange(LENGTH), 0).astype(np.int32),
            np.where(inside, 0, -1).astype(np.int32),
        )


class HfTrainer:
    """Qwen2ForCausalLM and torch.optim.AdamW as anyone would use them."""

    def __init__(self, spec: ModelSpec, weights: MemorySource, optimizer: AdamWPlan) -> None:
        config = to_hf_config(spec, dtype="float32")
        self.model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).float()
        state = {n: torch.from_numpy(weights.read(n).float32().copy()) for n in weights.names()}
        self.model.load_state_dict(state, strict=not spec.tie_word_embeddings)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        self.max_norm = optimizer.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": optimizer.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            betas=optimizer.betas,
            eps=optimizer.eps,
            foreach=False,
        )

    def step(self, batch: TokenBatch, lr: float) -> tuple[float, float]:
        logits = self.model(
            input_ids=torch.from_numpy(batch.tokens).long(),
            attention_mask=torch.from_numpy((batch.documents >= 0).astype(np.int64)),
        ).logits
        labels = torch.from_numpy(batch.labels).long()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
        )
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float(loss.detach()), float(norm)


@pytest.mark.parametrize("tied", [True, False])
def test_fifty_steps_match_transformers_and_torch_adamw(tied: bool) -> None:
    spec = small_spec(tied=tied)
    optimizer = AdamWPlan(weight_decay=0.1, max_grad_norm=1.0)
    theirs = HfTrainer(spec, random_weights(spec), optimizer)
    ours = loaded(spec, optimizer=optimizer)
    losses, worst_loss, worst_norm = [], 0.0, 0.0
    fixed = list(batches(spec, 5))
    for step in range(50):
        lr = 3e-3 * (1 + step % 7) / 7
        batch = fixed[step % 5]
        expected_loss, expected_norm = theirs.step(batch, lr)
        metrics = ours.train_step(batch, lr)
        losses.append(metrics.loss)
        worst_loss = max(worst_loss, abs(metrics.loss - expected_loss))
        worst_norm = max(worst_norm, abs(metrics.grad_norm / expected_norm - 1))
    assert losses[-1] < 0.5 * losses[0], "the comparison is only worth something if it learns"
    assert worst_loss <= 1e-4, worst_loss
    assert worst_norm <= 1e-3, worst_norm
    exported = dict(ours.export())
    for name, parameter in theirs.model.named_parameters():
        difference = np.abs(exported[name].float32() - parameter.detach().numpy()).max()
        assert difference <= 2e-3, (name, difference)


def test_decay_and_clipping_are_really_applied() -> None:
    spec = small_spec()
    batch = next(batches(spec, 1))
    ends = []
    for optimizer in (
        AdamWPlan(weight_decay=0.0, max_grad_norm=0.0),
        AdamWPlan(weight_decay=0.5, max_grad_norm=0.0),
    ):
        model = loaded(spec, optimizer=optimizer)
        model.train_step(batch, 1e-2)
        ends.append(dict(model.export()))
    start = random_weights(spec)
    for param in schema(spec):
        plain, decayed = ends[0][param.name].float32(), ends[1][param.name].float32()
        before = start.read(param.name).float32()
        expected = plain - 1e-2 * 0.5 * before if param.decays else plain
        np.testing.assert_allclose(decayed, expected, atol=1e-6)


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_accumulation_does_not_change_loss_or_update(micro: int) -> None:
    spec = small_spec()
    halves = list(batches(spec, 2))
    batch = TokenBatch(
        *(
            np.concatenate([getattr(h, f) for h in halves])
            for f in ("tokens", "labels", "positions", "documents")
        )
    )
    whole, parts = loaded(spec, micro_batch_rows=8), loaded(spec, micro_batch_rows=micro)
    for _ in range(3):
        a, b = whole.train_step(batch, 1e-3), parts.train_step(batch, 1e-3)
        assert b.loss == pytest.approx(a.loss, abs=2e-6)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
        assert b.supervised_tokens == a.supervised_tokens == int((batch.labels >= 0).sum())
    for (name, one), (_, other) in zip(whole.export(), parts.export(), strict=True):
        np.testing.assert_allclose(one.float32(), other.float32(), atol=2e-4, err_msg=name)


def packed(spec: ModelSpec, lengths: list[int], seq_len: int) -> tuple[TokenBatch, TokenBatch]:
    """The same documents in one packed row, and one per row."""
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, spec.vocab_size, n + 1).astype(np.int32) for n in lengths]

    def blank(rows: int) -> list[NDArray[np.int32]]:
        return [np.full((rows, seq_len), fill, np.int32) for fill in (0, IGNORED, 0, -1)]

    together, apart = blank(1), blank(len(lengths))
    column = 0
    for row, (ids, length) in enumerate(zip(documents, lengths, strict=True)):
        values = (ids[:-1], ids[1:], np.arange(length), np.full(length, row))
        for array, value in zip(together, values, strict=True):
            array[0, column : column + length] = value
        alone = (*values[:3], np.zeros(length))
        for index, array in enumerate(apart):
            array[row, :length] = alone[index]
        column += length
    return TokenBatch(*together), TokenBatch(*apart)


def test_packed_documents_do_not_see_each_other() -> None:
    spec = small_spec()
    together, apart = packed(spec, [9, 4, 13, 1], 32)
    one, many = loaded(spec), loaded(spec)
    a, b = one.loss(together), many.loss(apart)
    assert a.loss == pytest.approx(b.loss, abs=1e-5)
    assert a.supervised_tokens == b.supervised_tokens == 27
    assert a.tokens == b.tokens == 27
    first, second = one.train_step(together, 1e-3), many.train_step(apart, 1e-3)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-5)
    leaking = replace(together, documents=np.where(together.documents >= 0, 0, -1).astype(np.int32))
    assert abs(loaded(spec).loss(leaking).loss - b.loss) > 1e-3


def test_loss_equals_the_loss_of_the_step_and_changes_nothing() -> None:
    spec = small_spec(tied=False)
    batch = next(batches(spec, 1))
    model = loaded(spec)
    before = {name: tensor.float32().copy() for name, tensor in model.export()}
    measured = model.loss(batch)
    for name, tensor in model.export():
        np.testing.assert_array_equal(tensor.float32(), before[name])
    assert measured.grad_norm == 0
    assert model.train_step(batch, 1e-3).loss == pytest.approx(measured.loss, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunked_cross_entropy_equals_torch(chunk: int) -> None:
    from qwen2kit_torch.train.loss import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(61, 16, generator=generator, dtype=torch.float32, requires_grad=True)
    labels = torch.randint(0, 61, (23,), generator=generator)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    wanted = torch.autograd.grad(expected / 7, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk, dtype=torch.float32)
    found = torch.autograd.grad(loss / 7, (hidden, weight))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_resume_is_bit_identical(stop_after: int, tmp_path: Path) -> None:
    spec = small_spec()
    stream = list(batches(spec, 8))
    model = loaded(spec)
    losses = []
    for step, batch in enumerate(stream):
        if step == stop_after:
            saving = model.save_state(tmp_path)  # is written while training goes on
        losses.append(model.train_step(batch, 1e-3 * (step + 1)).loss)
    files = saving.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    again = trainable(spec)
    again.restore_state(tmp_path)
    resumed = [
        again.train_step(batch, 1e-3 * (step + 1)).loss
        for step, batch in enumerate(stream)
        if step >= stop_after
    ]
    assert resumed == losses[stop_after:]
    for (name, one), (_, other) in zip(model.export(), again.export(), strict=True):
        assert bytes(one.data) == bytes(other.data), name


def test_state_of_another_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    spec = small_spec()
    model = loaded(spec)
    model.train_step(next(batches(spec, 1)), 1e-3)
    (name,) = model.save_state(tmp_path).wait()
    with pytest.raises(WeightError, match="another model"):
        trainable(small_spec(num_hidden_layers=4)).restore_state(tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightError, match="cannot be read"):
        trainable(spec).restore_state(tmp_path)
    file.unlink()
    with pytest.raises(WeightError, match="missing"):
        trainable(spec).restore_state(tmp_path)


def test_init_depends_on_seed_and_name_only() -> None:
    spec, deeper = small_spec(), small_spec(num_hidden_layers=5)
    one, two, other = trainable(spec), trainable(deeper), trainable(spec)
    one.init(1)
    two.init(1)
    other.init(2)
    shared = dict(two.export())
    for name, tensor in one.export():
        assert bytes(tensor.data) == bytes(shared[name].data), name
    flat = np.concatenate(
        [t.float32().ravel() for n, t in one.export() if n.endswith("_proj.weight")]
    )
    assert flat.std() == pytest.approx(spec.initializer_range, rel=0.02)
    assert abs(flat.mean()) < 5e-4
    assert any(
        bytes(a.data) != bytes(b.data)
        for (_, a), (_, b) in zip(one.export(), other.export(), strict=True)
    )


def poisoned(spec: ModelSpec) -> MemorySource:
    source = random_weights(spec)
    tensors = {name: source.read(name) for name in source.names()}
    bad = tensors["model.norm.weight"].float32().copy()
    bad[0] = np.nan
    from qwen2kit.weights.tensor import from_float32

    return MemorySource(tensors | {"model.norm.weight": from_float32(bad, "float32")})


def test_non_finite_loss_raises_or_skips_and_leaves_parameters_alone() -> None:
    spec = small_spec()
    batch = next(batches(spec, 1))
    model = trainable(spec)
    model.load(poisoned(spec))
    with pytest.raises(TrainingError, match="loss is nan"):
        model.train_step(batch, 1e-3)
    skipping = trainable(spec, non_finite="skip")
    skipping.load(poisoned(spec))
    assert skipping.train_step(batch, 1e-3).skipped
    source = poisoned(spec)
    for name, tensor in skipping.export():
        np.testing.assert_array_equal(tensor.float32(), source.read(name).float32())


def test_bad_use_is_one_line() -> None:
    spec = small_spec()
    batch = next(batches(spec, 1))
    with pytest.raises(BackendError, match="no weights"):
        trainable(spec).train_step(batch, 1e-3)
    with pytest.raises(BackendError, match="float16"):
        get("torch").compile(spec, ExecutionPlan(device="cpu", dtype="float16", train=TrainPlan()))
    empty = replace(batch, labels=np.full_like(batch.labels, IGNORED))
    with pytest.raises(TrainingError, match="no token to learn"):
        loaded(spec).train_step(empty, 1e-3)


def test_bfloat16_autocast_learns_and_keeps_float32_masters() -> None:
    spec = small_spec()
    batch = next(batches(spec, 1))
    model = get("torch").compile(
        spec, ExecutionPlan(device="cpu", dtype="bfloat16", train=TrainPlan(micro_batch_rows=2))
    )
    assert isinstance(model, TrainableModel)
    model.load(random_weights(spec))
    exact = loaded(spec).loss(batch).loss
    assert model.loss(batch).loss == pytest.approx(exact, rel=0.02)
    losses = [model.train_step(batch, 3e-3).loss for _ in range(10)]
    assert losses[-1] < losses[0] - 0.5
    assert all(tensor.dtype == "float32" for _, tensor in model.export())
