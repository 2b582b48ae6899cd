"""Several stages: torch's pipelining runtime executes the schedule, our stages do the work.

The planner's schedule gives each rank its list of actions; transfers.py puts sends and receives in, and torch walks the
list. Forward and backward are ours, registered as custom functions of the action types; receives are torch's work
objects, waited for just before they are used. A send follows the action that makes what it sends at once, so that it is
part of it. A sent tensor is let go as soon as its transfer is over.

The stages of a second direction follow those of the first in torch's numbering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..costmodel.actions import LOAD, OFFLOAD, RECOMPUTE, Action
from ..planner.schedules import PipelineSchedule
from ._torch import ComputationType, ScheduleRuntime, StageBase, TorchAction, wait_all
from .stage import Meta, StageRunner, Variant
from .trace import Recorder
from .transfers import SENDS, communicating_lists

_KINDS = {
    "F": ComputationType.FORWARD,
    "B": ComputationType.FULL_BACKWARD,
    "I": ComputationType.BACKWARD_INPUT,
    "W": ComputationType.BACKWARD_WEIGHT,
    "RECV_F": ComputationType.RECV_F,
    "RECV_B": ComputationType.RECV_B,
    # torch has no kinds for these; of those that functions can be registered for, three that we use for nothing else
    "R": ComputationType.UNSHARD,
    "O": ComputationType.RESHARD,
    "L": ComputationType.REDUCE_GRAD,
}


@dataclass
class Work:
    """One step's microbatches, as all stages of this rank see them."""

    inputs: Sequence[Mapping[str, torch.Tensor]]
    variants: Mapping[int, Sequence[Variant]]  # number of the stage -> variant of each microbatch
    loss_grad: Callable[[int], torch.Tensor]
    training: bool
    results: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # last stages: microbatch -> kept values


class PipelineStage(StageBase):
    """What torch's runtime asks of a stage: lists of transfers."""

    def __init__(self, runner: StageRunner, device: torch.device, group: Any) -> None:
        super().__init__(nn.Module(), runner.number, len(runner.wiring.stages), device, group)
        self.runner, self.wiring = runner, runner.stage
        self.values: dict[int, list[torch.Tensor]] = {}  # received or handed over, by microbatch
        self.grads: dict[int, dict[str, torch.Tensor]] = {}
        self.variants: Sequence[Variant] = ()
        self._in_flight: dict[tuple[str, int], list[tuple[Any, torch.Tensor]]] = {}  # sends, the oldest first

    # torch's own set-up of shapes is not used: the plan knows them

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("shapes come from the plan")

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("shapes come from the plan")

    def _create_grad_recv_info(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("shapes come from the plan")

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self.values[fwd_chunk_id] = self._empty(self.wiring.receives, self.variants[fwd_chunk_id].metas)
        return self._receives(self.values[fwd_chunk_id], self.stage_index - 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        tensors = self._empty(self.wiring.grad_receives, self.variants[bwd_chunk_id].grad_metas)
        self.grads[bwd_chunk_id] = dict(zip(self.wiring.grad_receives, tensors, strict=True))
        return self._receives(tensors, self.stage_index + 1)

    def send_on(self, microbatch: int, tensors: Iterable[torch.Tensor]) -> None:
        self._send(("F", microbatch), tensors, self.stage_index + 1)

    def send_back(self, microbatch: int, tensors: Iterable[torch.Tensor]) -> None:
        self._send(("B", microbatch), tensors, self.stage_index - 1)

    def _empty(self, names: Sequence[str], metas: Mapping[str, Meta]) -> list[torch.Tensor]:
        return [torch.empty(metas[n][0], dtype=metas[n][1], device=self.device) for n in names]

    def _receives(self, tensors: Sequence[torch.Tensor], stage: int) -> list[dist.P2POp]:
        peer = self.stage_index_to_group_rank[stage]
        return [dist.P2POp(dist.irecv, t, group=self.group, group_peer=peer) for t in map(_real, tensors) if t.numel()]

    def _send(self, key: tuple[str, int], tensors: Iterable[torch.Tensor], stage: int) -> None:
        peer = self.stage_index_to_group_rank[stage]
        while self._in_flight and all(work.is_completed() for work, _ in next(iter(self._in_flight.values()))):
            del self._in_flight[next(iter(self._in_flight))]
        real = [_real(t.resolve_conj()).contiguous() for t in tensors if t.numel()]
        self._in_flight[key] = [(dist.isend(t, group=self.group, group_dst=peer), t) for t in real]

    def came_back(self, microbatch: int) -> None:
        """A gradient is here, so what was sent forward has arrived. gloo says so only to who waits for it."""
        for work, _ in self._in_flight.pop(("F", microbatch), ()):
            work.wait()

    def finish_sends(self) -> None:
        for sent in self._in_flight.values():
            for work, _ in sent:
                work.wait()
        self._in_flight.clear()

    def clear(self) -> None:
        self.values.clear()
        self.grads.clear()


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as real numbers: the backends send no complex ones."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class _Runtime(ScheduleRuntime):
    def _initialize_stages(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to infer and no warm-up: stages know their shapes."""


class PipelineEngine:
    """The stages of this rank under the schedules of steps of any number of microbatches."""

    def __init__(self, runners: Sequence[StageRunner], device: torch.device, group: Any, recorder: Recorder) -> None:
        self.stages = [PipelineStage(runner, device, group) for runner in runners]
        self.by_number = {stage.stage_index: stage for stage in self.stages}
        self.recorder = recorder
        self._runtimes: dict[tuple[int, bool], _Runtime] = {}
        self._work: Work | None = None
        # (stage, microbatch) of what is recomputed and of what is offloaded
        self._let_go: dict[tuple[int, bool], tuple[frozenset[tuple[int, int]], frozenset[tuple[int, int]]]] = {}
        self._again: frozenset[tuple[int, int]] = frozenset()
        self._away: frozenset[tuple[int, int]] = frozenset()

    def run(self, schedule: PipelineSchedule, work: Work) -> None:
        runtime = self._runtime(schedule)
        self._work = work
        for stage in self.stages:
            stage.variants = work.variants[stage.stage_index]
        count = schedule.num_microbatches
        self._again, self._away = self._let_go[schedule.num_microbatches, schedule.is_forward_only]
        try:
            runtime._step_microbatches([()] * count, [{}] * count)
            for stage in self.stages:
                stage.finish_sends()
        finally:
            self._work = None
            for stage in self.stages:
                stage.clear()

    def _runtime(self, schedule: PipelineSchedule) -> _Runtime:
        key = (schedule.num_microbatches, schedule.is_forward_only)
        if key not in self._runtimes:
            runtime = _Runtime(self.stages, schedule.num_microbatches, loss_fn=None, scale_grads=False)
            runtime.pipeline_order_with_comms = _torch_order(schedule)
            mapping = dict(enumerate(rank for row in schedule.placements for rank in row))
            runtime.stage_index_to_group_rank = mapping
            for stage in self.stages:
                stage.stage_index_to_group_rank = mapping
            runtime.register_custom_function(ComputationType.FORWARD, self._forward)
            runtime.register_custom_function(ComputationType.FULL_BACKWARD, self._backward)
            runtime.register_custom_function(ComputationType.BACKWARD_INPUT, self._backward)
            runtime.register_custom_function(ComputationType.BACKWARD_WEIGHT, self._backward_weight)
            runtime.register_custom_function(_KINDS[RECOMPUTE], self._recompute)
            runtime.register_custom_function(_KINDS[OFFLOAD], self._offload)
            runtime.register_custom_function(_KINDS[LOAD], self._load)
            self._runtimes[key] = runtime
            self._let_go[key] = schedule.places(RECOMPUTE), schedule.places(OFFLOAD)
        return self._runtimes[key]

    def _forward(self, action: Any, ctx: Any) -> None:
        work = self._work
        assert work is not None
        number, microbatch = action.stage_index, action.microbatch_index
        stage = self.by_number[number]
        wait_all(ctx.schedule_ref.fwd_recv_ops.pop((number, microbatch), []))
        with self.recorder.action("F", stage.wiring.index, microbatch):
            results = stage.runner.forward(
                microbatch,
                work.variants[number][microbatch],
                work.inputs[microbatch],
                stage.values.pop(microbatch, []),
                training=work.training,
                again=(number, microbatch) in self._again,
            )
        if (number, microbatch) in self._away:
            stage.runner.begin_offload(microbatch, work.inputs[microbatch])
        if stage.runner.is_last:
            work.results[microbatch] = results
        elif number + 1 in self.by_number:
            self.by_number[number + 1].values[microbatch] = list(results.values())
        else:
            stage.send_on(microbatch, results.values())

    def _backward(self, action: Any, ctx: Any) -> None:
        work = self._work
        assert work is not None
        number, microbatch = action.stage_index, action.microbatch_index
        stage = self.by_number[number]
        wait_all(ctx.schedule_ref.bwd_recv_ops.pop((number, microbatch), []))
        stage.came_back(microbatch)
        grads = stage.grads.pop(microbatch, {})
        if stage.runner.is_last:
            grads = {stage.runner.wiring.loss: work.loss_grad(microbatch)}
        defer = action.computation_type == ComputationType.BACKWARD_INPUT
        with self.recorder.action("I" if defer else "B", stage.wiring.index, microbatch):
            sent = stage.runner.backward(microbatch, work.variants[number][microbatch], grads, defer=defer)
        if not stage.wiring.index:
            return
        if number - 1 in self.by_number:
            self.by_number[number - 1].grads[microbatch] = sent
        else:
            stage.send_back(microbatch, sent.values())

    def _backward_weight(self, action: Any, ctx: Any) -> None:
        stage, microbatch = self.by_number[action.stage_index], action.microbatch_index
        with self.recorder.action("W", stage.wiring.index, microbatch):
            stage.runner.backward_weight(microbatch)

    def _recompute(self, action: Any, ctx: Any) -> None:
        work, number, microbatch = self._work, action.stage_index, action.microbatch_index
        assert work is not None
        runner = self.by_number[number].runner
        with self.recorder.action(RECOMPUTE, number, microbatch):
            runner.recompute(microbatch, work.variants[number][microbatch], work.inputs[microbatch])

    def _offload(self, action: Any, ctx: Any) -> None:
        with self.recorder.action(OFFLOAD, action.stage_index, action.microbatch_index):
            self.by_number[action.stage_index].runner.let_go(action.microbatch_index)

    def _load(self, action: Any, ctx: Any) -> None:
        with self.recorder.action(LOAD, action.stage_index, action.microbatch_index):
            self.by_number[action.stage_index].runner.load(action.microbatch_index)


def _torch_order(schedule: PipelineSchedule) -> dict[int, list[TorchAction]]:
    direction, num_stages = schedule.direction, schedule.num_stages

    def in_torch(action: Action) -> TorchAction:
        number = direction[action.microbatch] * num_stages + action.stage
        return TorchAction(number, _KINDS[action.kind], action.microbatch)

    lists = communicating_lists(schedule)
    return {rank: [in_torch(action) for action in row if action.kind not in SENDS] for rank, row in enumerate(lists)}
