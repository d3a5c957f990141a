"""TorchTrainableModel: float32 master weights, one AdamW step at a time, on one process or many.

With bfloat16 as compute dtype the forward pass runs under autocast; parameters, gradients and
moments stay float32. What is divided over which processes is decided in `build`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwen2kit.backend.plan import ExecutionPlan, TrainPlan
from qwen2kit.backend.protocol import (
    LoadReport,
    Score,
    ScoreRequest,
    StepMetrics,
    TokenBatch,
    TokenIds,
)
from qwen2kit.backend.slots import PersistentSlots
from qwen2kit.errors import BackendError, TrainingError
from qwen2kit.plan.degrees import check_degrees
from qwen2kit.spec.model import ModelSpec
from qwen2kit.spec.schema import EMBED_TOKENS
from qwen2kit.weights.source import MemorySource, WeightSource
from qwen2kit.weights.tensor import HostTensor
from qwen2kit_torch.compiled import TorchModel
from qwen2kit_torch.lora import dropout
from qwen2kit_torch.lora_weights import export_factors, export_merged
from qwen2kit_torch.parallel.mesh import Mesh
from qwen2kit_torch.parallel.pipeline import Pipeline
from qwen2kit_torch.parallel.processes import connect
from qwen2kit_torch.train.batch import Cutting
from qwen2kit_torch.train.build import build, ends_group
from qwen2kit_torch.train.flash import takes_flash
from qwen2kit_torch.train.init import init_parameters
from qwen2kit_torch.train.optim import build_adamw, global_norm, guarded_step
from qwen2kit_torch.train.parameters import gather, settle_gradients
from qwen2kit_torch.train.profiling import profile_into
from qwen2kit_torch.train.state import BackgroundSave, restore_state, save_state
from qwen2kit_torch.train.weights import load_adapted, load_parameters
from qwen2kit_torch.weights import as_host

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TorchTrainableModel(TorchModel):
    """Implements `qwen2kit.backend.protocol.TrainableModel`.

    Attributes:
        settings: the plan's training settings.
        mesh: the processes.
        data_shard: ``(rank, world)`` among those that read different rows.

    Raises:
        BackendError: as `TorchModel`; or float16, whose gradients would need loss scaling.
        ConfigError: the model cannot be divided as the plan says.
    """

    def __init__(self, spec: ModelSpec, plan: ExecutionPlan) -> None:
        if plan.train is None:
            raise BackendError("a trainable model needs a plan with training settings")
        world = connect(plan.device).world
        super().__init__(spec, plan)
        if self.dtype == torch.float16:
            raise BackendError("training in float16 is not supported; use bfloat16 or float32")
        degrees = plan.train.parallel.fill(world)
        check_degrees(spec, degrees)
        self.settings: TrainPlan = replace(plan.train, parallel=degrees)
        self.mesh = Mesh(degrees, self.device.type)
        self.data_shard = (self.mesh.rank("data"), self.mesh.size("data"))
        self._built = build(
            self.module, self.settings, self.mesh, dtype=self.dtype, device=self.device
        )
        self._parameters = dict(self.module.named_parameters())
        self._trained = {n: p for n, p in self._parameters.items() if p.requires_grad}
        self._optimizer = build_adamw(self._parameters, self.settings.optimizer)
        self._cut = self._cutting(world)
        self._ends = ends_group(self.mesh) if spec.tie_word_embeddings else None
        self._background = dist.new_group(backend="gloo") if world > 1 else None
        self._pipeline = self._make_pipeline()
        self._has_weights = False
        self._steps = 0

    def load(self, weights: WeightSource) -> LoadReport:
        """Fill the master weights, strictly, and forget the optimizer's state.

        With an adapter in the plan these are the frozen weights, and the adapter starts anew.
        """
        if self.settings.adapter is None:
            report = load_parameters(self._parameters, self.spec, weights)
        else:
            report = load_adapted(self.module, self.settings.adapter, weights, self.device)
        self._start()
        return report

    def init(self, seed: int) -> None:
        """Fresh parameters: a function of ``seed`` and the schema, on every device the same."""
        if self.settings.adapter is not None:
            raise BackendError("an adapter needs the weights of a checkpoint: load them")
        init_parameters(self._parameters, self.spec, seed)
        self._start()

    def train_step(self, batch: TokenBatch, lr: float, *, max_loss: float = inf) -> StepMetrics:
        """One AdamW step on the mean loss over all supervised tokens of the global batch.

        Raises:
            TrainingError: the batch has nothing to learn from, the device is out of memory, or
                loss or gradient is not finite and the plan says ``raise``; parameters are then
                as before the step.
        """
        self._check_loaded()
        supervised, tokens = self._count(batch)
        self._optimizer.zero_grad(set_to_none=True)
        try:
            outcome = self._update(self._accumulate(batch, supervised), lr, max_loss)
        except torch.OutOfMemoryError as error:
            self._optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"out of memory on {self.device}; lower train.micro_batch_rows or seq_len, or "
                "set train.recompute"
            ) from error
        # The step's only wait for the device: all its work is queued by now.
        mean, grad_norm, taken = outcome.tolist()
        self._steps += int(taken)
        finite = isfinite(mean) and isfinite(grad_norm)
        if not finite and self.settings.non_finite == "raise":
            self._optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"loss is {mean} and gradient norm {grad_norm}; lower train.lr, or set "
                "train.non_finite=skip to leave such steps out"
            )
        return self._metrics(mean, grad_norm, supervised, tokens, skipped=not taken)

    def loss(self, batch: TokenBatch) -> StepMetrics:
        """Mean loss of ``batch`` by the same arithmetic as `train_step`, changing nothing."""
        self._check_loaded()
        supervised, tokens = self._count(batch)
        if self._pipeline is not None:
            total = self._pipeline.loss(list(self._cut(batch)))
        else:
            with torch.no_grad():
                total = self._sequentially(batch, 1.0, lambda loss: None)
        mean = float(self._sum(total, "loss")) / supervised
        return self._metrics(mean, 0.0, supervised, tokens, skipped=False)

    def save_state(self, directory: Path) -> BackgroundSave:
        """Begin to write what trains and the optimizer's state into an existing directory."""
        self._check_loaded()
        own = {n: p for n, p in self._trained.items() if n not in self._built.copies}
        return save_state(directory, own, self._optimizer, self._background)

    def restore_state(self, directory: Path) -> None:
        """Read what `save_state` wrote. With an adapter in the plan, load the weights first.

        Raises:
            WeightError: it does not fit this model, or is damaged.
            BackendError: the frozen weights of an adapter are missing.
        """
        if self.settings.adapter is not None:
            self._check_loaded()
        self._steps = restore_state(
            directory,
            self._trained,
            self._optimizer,
            self._background,
            everything=self._pipeline is None,
        )
        self._has_weights = True

    def profiler(self, directory: Path) -> AbstractContextManager[None]:
        """Trace what runs inside the context into ``directory``, for chrome://tracing."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        return profile_into(directory, rank)

    def export(self) -> Iterator[tuple[str, HostTensor]]:
        """All schema parameters in schema order, canonical names, whole; collective."""
        self._check_loaded()
        if self.settings.adapter is not None:
            yield from export_merged(self.module)
            return
        if self.mesh.degrees.world == 1:
            yield from super().export()
            return
        places = self._built.places
        for name, value in gather(self._parameters, self.spec, places, self.mesh, self.device):
            yield name, as_host(value)

    def export_adapter(self) -> Iterator[tuple[str, HostTensor]]:
        """A and B of every adapted matrix, whole, float32; collective."""
        self._check_loaded()
        return export_factors(self.module)

    def logits(self, tokens: TokenIds) -> NDArray[np.float32]:
        """Logits ``[T, vocab]`` in float32, without any cache."""
        return super().logits(tokens) if self._is_plain else self._copy().logits(tokens)

    def hidden_states(self, tokens: TokenIds) -> NDArray[np.float32]:
        """``[layers + 2, T, hidden]`` float32: embedding, every layer, final norm."""
        if self._is_plain:
            return super().hidden_states(tokens)
        return self._copy().hidden_states(tokens)

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        """Log-probabilities of continuations, the same on every process."""
        return super().score(requests) if self._is_plain else self._copy().score(requests)

    def slots(self, count: int, capacity: int) -> PersistentSlots:
        """Room for sequences that the present weights continue, the same on every process."""
        if self._is_plain:
            return super().slots(count, capacity)
        return self._copy().slots(count, capacity)

    @property
    def _is_plain(self) -> bool:
        """Whether the training network itself can run inference."""
        return self.mesh.degrees.world == 1 and not self._built.compiled

    def _copy(self) -> TorchModel:
        """The present weights as an undivided model for inference."""
        plan = replace(self.plan, train=None, device=str(self.device))
        copy = TorchModel(self.spec, plan)
        copy.load(MemorySource(dict(self.export())))
        return copy

    def _cutting(self, world: int) -> Cutting:
        varlen = self.device.type == "cuda" and self.dtype == torch.bfloat16
        wish, head_dim = self.settings.attention, self.spec.head_dim
        return Cutting(
            rows=self.settings.micro_batch_rows,
            device=self.device,
            windows=tuple({self.spec.window_of(i) for i in range(self.spec.num_hidden_layers)}),
            fixed=world > 1 or self._built.compiled,
            varlen=varlen,
            flash=takes_flash(wish, self.device, self.dtype, head_dim),
            cp=self.mesh.group("cp"),
        )

    def _make_pipeline(self) -> Pipeline | None:
        group = self.mesh.group("pp")
        if group is None:
            return None
        schedule = self.settings.parallel.schedule
        return Pipeline(self._built.stage, self._built.place, group, schedule, self.device)

    def _accumulate(self, batch: TokenBatch, supervised: int) -> Tensor:
        """Gradients of the mean loss; returns it, a float32 scalar."""
        with self._dropout():
            scale = 1 / supervised
            if self._pipeline is not None:
                total = self._pipeline.forward_backward(list(self._cut(batch)), scale)
            else:
                total = self._sequentially(batch, scale, torch.autograd.backward)
        settle_gradients(self._trained.values())
        self._join_tied_gradients()
        return self._sum(total, "loss")

    def _update(self, loss: Tensor, lr: float, max_loss: float) -> Tensor:
        """The optimizer's step; float32 ``[3]`` as `guarded_step` returns it."""
        copies = [self._parameters[name] for name in self._built.copies]
        pipeline = self.mesh.group("pp")
        norm = global_norm(self._trained.values(), copies=copies, pipeline=pipeline)
        return guarded_step(
            self._optimizer,
            lr,
            loss=loss,
            norm=norm,
            max_norm=self.settings.optimizer.max_grad_norm,
            max_loss=max_loss,
        )

    def _dropout(self) -> AbstractContextManager[None]:
        adapter = self.settings.adapter
        if adapter is None:
            return nullcontext()
        return dropout(self.module, adapter, step=self._steps, rank=self.data_shard[0])

    def _sequentially(
        self, batch: TokenBatch, scale: float, then: Callable[[Tensor], None]
    ) -> Tensor:
        """The scaled sum of losses of ``batch``'s micro-batches, each handed to ``then`` at once.

        A micro-batch is cut while the device works on the one before it.
        """
        stage = self._built.stage
        stage.scale = scale
        total = torch.zeros((), device=self.device)
        for micro in self._cut(batch):
            stage.micros = (micro,)
            loss: Tensor = stage(total, 0)
            then(loss)
            total += loss.detach()[0]
        return total

    def _join_tied_gradients(self) -> None:
        """Add up the gradients of a tied embedding's two copies in a pipeline."""
        if self._ends is None:
            return
        gradient = self._parameters[EMBED_TOKENS].grad
        assert gradient is not None
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        dist.all_reduce(local, group=self._ends)

    def _count(self, batch: TokenBatch) -> tuple[int, int]:
        """Supervised and all tokens of the global batch."""
        supervised = int(np.count_nonzero(batch.labels >= 0))
        tokens = int(np.count_nonzero(batch.documents >= 0))
        if self.mesh.size("data") > 1:
            counts = torch.tensor([supervised, tokens], device=self.device)
            supervised, tokens = self._sum(counts, "data").tolist()
        if supervised == 0:
            raise TrainingError("the batch holds no token to learn from")
        return supervised, tokens

    def _sum(self, value: Tensor, axis: str) -> Tensor:
        group = self.mesh.group(axis)
        if group is not None:
            dist.all_reduce(value, group=group)
        return value

    def _metrics(
        self, loss: float, grad_norm: float, supervised: int, tokens: int, *, skipped: bool
    ) -> StepMetrics:
        peak = None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        return StepMetrics(
            loss=loss,
            grad_norm=grad_norm,
            tokens=tokens,
            supervised_tokens=supervised,
            skipped=skipped,
            peak_memory_bytes=peak,
        )

    def _start(self) -> None:
        self._optimizer.state.clear()
        self._steps = 0
        self._has_weights = True

    def _check_loaded(self) -> None:
        if not self._has_weights:
            raise BackendError("the model has no weights yet; load or initialise them first")
