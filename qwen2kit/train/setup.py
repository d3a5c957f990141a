"""From a recipe to the parts of a run: spec, tokenizer, data, compiled model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeGuard

from qwen2kit.backend.plan import AdamWPlan, ExecutionPlan, LoRAPlan, TrainPlan
from qwen2kit.backend.processes import Processes, SingleProcess
from qwen2kit.backend.protocol import AdapterModel, Backend, DistributedBackend, TrainableModel
from qwen2kit.backend.registry import get
from qwen2kit.config.data_tree import EmbeddedData
from qwen2kit.config.tree import ModelConfig, RunConfig
from qwen2kit.data.background import Prefetched
from qwen2kit.data.encode import read_texts
from qwen2kit.data.loader import Batches, Loader
from qwen2kit.data.open_data import DataOpener
from qwen2kit.data.row_source import RowLayout, RowSource, RowTable, TableSource
from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.plan.degrees import Degrees
from qwen2kit.plan.hardware import peak_flops
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.presets import preset
from qwen2kit.tokenizer.bpe import Tokenizer
from qwen2kit.tokenizer.train_bbpe import train_bbpe
from qwen2kit.weights.checkpoint import Checkpoint, open_checkpoint
from qwen2kit.weights.locate import locate

TRAIN_TOKENIZER = "train"
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Origin:
    """What the weights of a run belong to."""

    spec: ModelSpec
    tokenizer: Tokenizer


def build_origin(config: RunConfig) -> Origin:
    """Spec and tokenizer of ``config.model``.

    Raises:
        Qwen2KitError: the preset, checkpoint or tokenizer does not exist or does not fit.
    """
    model = config.model
    checkpoint = initial_checkpoint(model)
    if checkpoint is not None:
        if config.adapter is not None and checkpoint.adapter is not None:
            raise ConfigError(
                f"{model.checkpoint} is an adapter already; merge it first: "
                "qwen2kit convert BASE OUT --adapter ADAPTER"
            )
        origin = Origin(apply_overrides(checkpoint.spec, model), checkpoint.tokenizer())
    else:
        assert model.preset is not None
        spec = apply_overrides(preset(model.preset), model)
        origin = Origin(spec, _tokenizer(config, spec))
    check_vocabulary(origin.spec, origin.tokenizer)
    return origin


def initial_checkpoint(model: ModelConfig) -> Checkpoint | None:
    """The weights to start from, or None for fresh ones. Raises WeightError."""
    return None if model.checkpoint is None else open_checkpoint(locate(model.checkpoint))


def apply_overrides(spec: ModelSpec, model: ModelConfig) -> ModelSpec:
    """``spec`` with the recipe's fields laid over it.

    Raises:
        ConfigError: the result is impossible.
    """
    changes: dict[str, object] = dict(model.overrides())
    if model.rope_theta is not None:
        del changes["rope_theta"]
        changes["rope"] = replace(spec.rope, rope_theta=model.rope_theta)
    return replace(spec, **changes)  # type: ignore[arg-type]


def check_vocabulary(spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if the tokenizer has more ids than the model."""
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab_size is "
            f"{spec.vocab_size}; raise model.vocab_size"
        )


def _tokenizer(config: RunConfig, spec: ModelSpec) -> Tokenizer:
    source = config.model.tokenizer
    assert source is not None
    if source == TRAIN_TOKENIZER:
        return train_bbpe(read_texts(config.data), spec.vocab_size)
    return open_tokenizer(source)


def open_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a model; a local directory may hold the tokenizer files alone."""
    directory = Path(source).expanduser()
    if directory.is_dir() and not (directory / "model").is_dir():
        return Tokenizer.from_dir(directory)
    path = locate(source)
    return Tokenizer.from_dir(path) if path.is_dir() else open_checkpoint(path).tokenizer()


def training_backend(config: RunConfig) -> Backend:
    """The recipe's backend, which must be installed and able to train.

    Raises:
        BackendError: it is unknown, its framework is missing, or it runs inference only.
    """
    backend = get(config.backend)
    if not backend.capabilities().trains:
        raise BackendError(f"backend {backend.name!r} cannot train; use backend=torch")
    return backend


def distributed_backend(config: RunConfig) -> DistributedBackend:
    """The recipe's backend, which must be able to train with several processes (BackendError)."""
    backend = training_backend(config)
    if not _is_distributed(backend):
        raise BackendError(f"backend {backend.name!r} trains in one process only")
    return backend


def join(config: RunConfig) -> Processes:
    """The processes of this run: those the launcher started, or this one alone.

    Raises:
        BackendError: the backend cannot train, or not with the several processes that were
            started, or they do not find each other.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone and not _is_distributed(training_backend(config)):
        return SingleProcess()
    return distributed_backend(config).processes(execution_plan(config))


def _is_distributed(backend: Backend) -> TypeGuard[DistributedBackend]:
    return isinstance(backend, DistributedBackend) and backend.capabilities().distributed


def compile_model(
    backend: Backend, config: RunConfig, spec: ModelSpec, world: int
) -> TrainableModel:
    """``spec`` compiled for training on ``world`` processes.

    Raises:
        BackendError: the backend cannot train this model here.
    """
    model = backend.compile(spec, execution_plan(config, degrees(config, world)))
    if not isinstance(model, TrainableModel):
        raise BackendError(f"backend {backend.name!r} did not return a trainable model")
    if config.adapter is not None and not isinstance(model, AdapterModel):
        raise BackendError(f"backend {backend.name!r} does not train adapters; use backend=torch")
    return model


def degrees(config: RunConfig, world: int) -> Degrees:
    """The recipe's mesh on ``world`` processes. Raises ConfigError if they do not fit."""
    return Degrees(**asdict(config.parallel)).fill(world)


def peak_of(backend: Backend, config: RunConfig, world: int) -> float | None:
    """FLOP/s that all processes together could do in dense matrix products; None if unknown."""
    devices = backend.devices()
    device = next((d for d in devices if d.name == config.device), devices[0])
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    peak = peak_flops(device.kind, dtype)
    return None if peak is None else peak * world


def execution_plan(config: RunConfig, parallel: Degrees | None = None) -> ExecutionPlan:
    """What the backend is told of the recipe; steps that are not finite are judged by core."""
    train, optimizer = config.train, config.train.optimizer
    return ExecutionPlan(
        device=config.device,
        dtype=config.dtype,
        cpu_threads=config.cpu_threads,
        train=TrainPlan(
            optimizer=AdamWPlan(
                betas=optimizer.betas,
                eps=optimizer.eps,
                weight_decay=optimizer.weight_decay,
                max_grad_norm=optimizer.max_grad_norm,
            ),
            micro_batch_rows=train.micro_batch_rows,
            loss_chunk_tokens=train.loss_chunk_tokens,
            non_finite="skip",
            parallel=parallel or Degrees(),
            attention=train.attention,
            recompute=train.recompute,
            compile=train.compile,
            float8=train.float8,
            tune_products=train.tune_products,
            adapter=None
            if config.adapter is None
            else LoRAPlan(**asdict(config.adapter), seed=train.seed),
        ),
    )


@dataclass(frozen=True, slots=True)
class RunData:
    """Loaders over the training and (if the recipe has any) the held-out examples."""

    train: Batches
    held_out: Loader | None

    def close(self) -> None:
        """Stop what loads in the background; the last call of a run."""
        self.train.close()


def build_data(
    config: RunConfig, tokenizer: Tokenizer, note: Note, shard: tuple[int, int] = (0, 1)
) -> RunData:
    """Open the recipe's data; ``note`` is told what was truncated or left out.

    Args:
        shard: ``(rank, world)`` among the processes that read different rows
            (`TrainableModel.data_shard`).

    Raises:
        DataError: the data cannot be read or does not fit the recipe, or holding out leaves
            nothing to train on.
    """
    layout = RowLayout(
        seq_len=config.seq_len,
        seed=config.train.seed,
        pad_id=tokenizer.eot_id,
        packing=config.packing,
        split=config.task == "pretrain",
    )
    opener = DataOpener(
        tokenizer=tokenizer, task=config.task, layout=layout, too_long=config.too_long, note=note
    )
    held_out: RowTable | None = None
    if config.eval.fraction > 0 and not isinstance(config.data, EmbeddedData):
        train, held_out = opener.table(config.data).hold_out(config.eval.fraction)
        source: RowSource = TableSource(train)
    else:
        source = opener.source(config.data)
        if config.eval.data is not None:
            held_out = opener.table(config.eval.data)
        elif isinstance(config.data, EmbeddedData):
            held_out = opener.table(config.data, held_out=True)
    rows = config.train.batch_rows
    return RunData(
        Prefetched(Loader(source, batch_rows=rows, shard=shard)),
        None if held_out is None else Loader(TableSource(held_out), batch_rows=rows, shard=shard),
    )


def total_steps(config: RunConfig, loader: Batches) -> int:
    """Steps of the run; with ``epochs``, enough that every row is seen that often."""
    train = config.train
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    rows = sum(loader.rows_in(epoch) for epoch in range(train.epochs))
    return -(-rows // train.batch_rows)
