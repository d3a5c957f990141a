"""Pipeline parallelism by torch.distributed.pipelining, for stages that know their micro-batches.

The schedule only passes hidden states and the number of a micro-batch; everything else about
it (positions, documents, labels) every stage has from its own copy of the host batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from qwen2kit.plan.stages import Stage
from qwen2kit_torch.train.batch import MicroBatch
from qwen2kit_torch.train.stage import TrainStage

_SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Pipeline:
    """Runs the micro-batches of a step through all stages.

    Args:
        stage: this process's part of the model.
        place: which part it is.
        group: the ``pp`` axis.
        schedule: order of forward and backward passes.
        device: where the stage lives.
    """

    def __init__(
        self,
        stage: TrainStage,
        place: Stage,
        group: dist.ProcessGroup,
        schedule: Literal["gpipe", "1f1b"],
        device: torch.device,
    ) -> None:
        self._stage = stage
        self._place, self._group, self._device = place, group, device
        self._schedule = _SCHEDULES[schedule]
        self._built: dict[tuple[int, tuple[int, ...]], PipelineScheduleSingle] = {}

    def forward_backward(self, micros: Sequence[MicroBatch], scale: float) -> Tensor:
        """Accumulate the gradients of ``scale`` times the summed loss of ``micros``.

        Returns that loss, float32 scalar, on the last stage; zero on the others.
        """
        self._stage.scale = scale
        return self._run(micros, train=True)

    def loss(self, micros: Sequence[MicroBatch]) -> Tensor:
        """The summed loss on the last stage, zero on the others; no gradients."""
        self._stage.scale = 1.0
        return self._run(micros, train=False)

    def _run(self, micros: Sequence[MicroBatch], *, train: bool) -> Tensor:
        self._stage.micros = micros
        schedule = self._for(len(micros), self._stage.hidden_shape(micros[0]))
        numbers = torch.arange(len(micros))
        losses: list[Tensor] = []
        arguments = (numbers,) if self._place.first else ()
        target = numbers if self._place.last else None
        run = schedule.step if train else schedule.eval
        run(*arguments, number=numbers, target=target, losses=losses)
        total = torch.zeros((), device=self._device)
        return total + torch.stack(losses).sum().detach() if losses else total

    def _for(self, count: int, hidden: tuple[int, ...]) -> PipelineScheduleSingle:
        key = (count, hidden)
        if key not in self._built:
            dtype = self._stage.dtype
            between = torch.empty(hidden, dtype=dtype, device="meta", requires_grad=True)
            number = torch.empty(1, dtype=torch.int64, device="meta")
            loss = torch.empty(1, device="meta", requires_grad=True)
            stage = PipelineStage(
                self._stage,
                self._place.index,
                self._place.count,
                self._device,
                input_args=number if self._place.first else between,
                output_args=loss if self._place.last else between,
                group=self._group,
            )
            self._built[key] = self._schedule(
                stage, n_microbatches=count, loss_fn=_already_the_loss, scale_grads=False
            )
        return self._built[key]


def _already_the_loss(output: Tensor, target: Tensor) -> Tensor:
    return output.sum()
