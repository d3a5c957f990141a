"""TorchTrainableModel: float32 master weights, one AdamW step at a time.

With bfloat16 as compute dtype the forward pass runs under autocast; parameters, gradients and
moments stay float32. Shapes: B rows, T tokens, D hidden, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isfinite
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen2kit.backend.plan import ExecutionPlan, TrainPlan
from qwen2kit.backend.protocol import LoadReport, Saved, StepMetrics, TokenBatch
from qwen2kit.errors import BackendError, TrainingError
from qwen2kit.spec.model import ModelSpec
from qwen2kit.weights.source import WeightSource
from qwen2kit_torch.compiled import TorchModel
from qwen2kit_torch.train.batch import MicroBatch, micro_batches
from qwen2kit_torch.train.init import init_parameters
from qwen2kit_torch.train.loss import linear_cross_entropy
from qwen2kit_torch.train.optim import build_adamw, clip_gradients, set_learning_rate
from qwen2kit_torch.train.state import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    restore_state,
    save_state,
)


class TorchTrainableModel(TorchModel):
    """Implements `qwen2kit.backend.protocol.TrainableModel`.

    Attributes:
        settings: the plan's training settings.

    Raises:
        BackendError: as `TorchModel`; or float16, whose gradients would need loss scaling.
    """

    def __init__(self, spec: ModelSpec, plan: ExecutionPlan) -> None:
        super().__init__(spec, plan)
        if plan.train is None:
            raise BackendError("a trainable model needs a plan with training settings")
        self.data_shard = (0, 1)
        if self.dtype == torch.float16:
            raise BackendError("training in float16 is not supported; use bfloat16 or float32")
        self.settings: TrainPlan = plan.train
        self.module.to_empty(device=self.device)
        self._parameters = dict(self.module.named_parameters())
        self._optimizer = build_adamw(self._parameters, spec, plan.train.optimizer)
        self._has_weights = False

    def load(self, weights: WeightSource) -> LoadReport:
        """Fill the master weights, strictly, and forget the optimizer's state."""
        report = super().load(weights)
        self._start()
        return report

    def init(self, seed: int) -> None:
        """Fresh parameters: a function of ``seed`` and the schema, on every device the same."""
        init_parameters(self.module, self.spec, seed)
        self._start()

    def train_step(self, batch: TokenBatch, lr: float, *, max_loss: float = inf) -> StepMetrics:
        """One AdamW step on the mean loss over all supervised tokens of ``batch``.

        Raises:
            TrainingError: the batch has nothing to learn from, the device is out of memory, or
                loss or gradient is not finite and the plan says ``raise``; parameters are then
                as before the step.
        """
        self._check_loaded()
        supervised = _supervised(batch)
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        try:
            for micro in self._micro_batches(batch):
                loss = self._summed_loss(micro) / supervised
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory on {self.device}; lower train.micro_batch_rows or seq_len"
            ) from error
        norm = clip_gradients(self._parameters, self.settings.optimizer.max_grad_norm)
        mean, grad_norm = float(total), float(norm)
        finite = isfinite(mean) and isfinite(grad_norm)
        applied = finite and mean <= max_loss
        if applied:
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
        elif not finite and self.settings.non_finite == "raise":
            self._optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"loss is {mean} and gradient norm {grad_norm}; lower train.lr, or set "
                "train.non_finite=skip to leave such steps out"
            )
        return _metrics(batch, mean, grad_norm, supervised, skipped=not applied)

    def loss(self, batch: TokenBatch) -> StepMetrics:
        """Mean loss of ``batch`` by the same arithmetic as `train_step`, changing nothing."""
        self._check_loaded()
        supervised = _supervised(batch)
        total = torch.zeros((), device=self.device)
        for micro in self._micro_batches(batch):
            total += self._summed_loss(micro, frozen=True) / supervised
        return _metrics(batch, float(total), 0.0, supervised, skipped=False)

    def save_state(self, directory: Path) -> Saved:
        """Write weights and optimizer state (safetensors) into an existing directory."""
        self._check_loaded()
        save_state(directory, self._parameters, self._optimizer)
        return Saved((MODEL_FILE, OPTIMIZER_FILE))

    def restore_state(self, directory: Path) -> None:
        """Read what `save_state` wrote. Raises WeightError if it does not fit this model."""
        restore_state(directory, self._parameters, self._optimizer)
        self._has_weights = True

    def _start(self) -> None:
        self._optimizer.state.clear()
        self._has_weights = True

    def _check_loaded(self) -> None:
        if not self._has_weights:
            raise BackendError("the model has no weights yet; load or initialise them first")

    def _micro_batches(self, batch: TokenBatch) -> Iterator[MicroBatch]:
        return micro_batches(batch, self.settings.micro_batch_rows, self.device)

    def _summed_loss(self, micro: MicroBatch, *, frozen: bool = False) -> Tensor:
        # Gradients stay enabled even when frozen: without them linear layers take an
        # inference-only kernel that autocast does not reach.
        bfloat16 = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            hidden_BTD = self.module.forward_hidden(
                micro.tokens, positions=micro.positions, documents=micro.documents
            )
        hidden_ND = hidden_BTD.flatten(0, 1)[micro.where]
        head = self._head_weight()
        if frozen:
            hidden_ND, head = hidden_ND.detach(), head.detach()
        return linear_cross_entropy(
            hidden_ND,
            head,
            micro.labels,
            chunk=self.settings.loss_chunk_tokens,
            dtype=self.dtype,
        )

    def _head_weight(self) -> Tensor:
        if self.spec.tie_word_embeddings:
            return self.module.model.embed_tokens.weight
        return self.module.lm_head.weight


def _supervised(batch: TokenBatch) -> int:
    count = int(np.count_nonzero(batch.labels >= 0))
    if count == 0:
        raise TrainingError("the batch holds no token to learn from")
    return count


def _metrics(
    batch: TokenBatch, loss: float, grad_norm: float, supervised: int, *, skipped: bool
) -> StepMetrics:
    return StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        tokens=int(np.count_nonzero(batch.documents >= 0)),
        supervised_tokens=supervised,
        skipped=skipped,
    )
