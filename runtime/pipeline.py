"""Several stages: torch's pipelining runtime executes the schedule, our stages do the work.

The planner's schedule gives each rank its list of actions, and torch walks it; what an action does is ours, registered
as custom functions of the action types. transfers.py says where sends and receives stand between the actions: a send
right behind the action that makes what it sends, receives before the next action. So both are part of the action that
they follow. A receive is waited for just before it is used; a sent tensor is let go as soon as its transfer is over.

The stages of a second direction follow those of the first in torch's numbering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..costmodel.actions import LOAD, OFFLOAD, RECOMPUTE
from ..schedules import PipelineSchedule
from ._torch import ComputationType, ScheduleRuntime, StageBase, TorchAction
from .stage import Meta, StageRunner, Variant
from .trace import Recorder
from .transfers import RECEIVE_BACKWARD, RECEIVE_FORWARD, communicating_lists

_KINDS = {
    "F": ComputationType.FORWARD,
    "B": ComputationType.FULL_BACKWARD,
    "I": ComputationType.BACKWARD_INPUT,
    "W": ComputationType.BACKWARD_WEIGHT,
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
    """A stage as torch's runtime knows it, and its transfers."""

    def __init__(self, runner: StageRunner, device: torch.device, group: Any) -> None:
        super().__init__(nn.Module(), runner.number, len(runner.wiring.stages), device, group)
        self.runner, self.wiring = runner, runner.stage
        self.values: dict[int, list[torch.Tensor]] = {}  # received or handed over, by microbatch
        self.grads: dict[int, dict[str, torch.Tensor]] = {}
        self.variants: Sequence[Variant] = ()
        self._in_flight: dict[tuple[str, int], list[tuple[Any, torch.Tensor]]] = {}  # sends, the oldest first
        self._awaited: dict[tuple[str, int], list[Any]] = {}  # receives

    # torch's own set-up of shapes is not used: the plan knows them

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("shapes come from the plan")

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("shapes come from the plan")

    def _create_grad_recv_info(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("shapes come from the plan")

    def receive(self, kind: str, microbatch: int) -> None:
        """Begins; kind: RECV_F or RECV_B."""
        if kind == RECEIVE_FORWARD:
            tensors = self._empty(self.wiring.receives, self.variants[microbatch].metas)
            self.values[microbatch], source = tensors, self.stage_index - 1
        else:
            tensors = self._empty(self.wiring.grad_receives, self.variants[microbatch].grad_metas)
            self.grads[microbatch] = dict(zip(self.wiring.grad_receives, tensors, strict=True))
            source = self.stage_index + 1
        peer = self.stage_index_to_group_rank[source]
        self._awaited[kind, microbatch] = [
            dist.irecv(t, group=self.group, group_src=peer) for t in map(_real, tensors) if t.numel()
        ]

    def wait(self, kind: str, microbatch: int) -> None:
        for work in self._awaited.pop((kind, microbatch), ()):
            work.wait()

    def send_on(self, microbatch: int, tensors: Iterable[torch.Tensor]) -> None:
        self._send(("F", microbatch), tensors, self.stage_index + 1)

    def send_back(self, microbatch: int, tensors: Iterable[torch.Tensor]) -> None:
        self._send(("B", microbatch), tensors, self.stage_index - 1)

    def _empty(self, names: Sequence[str], metas: Mapping[str, Meta]) -> list[torch.Tensor]:
        return [torch.empty(metas[n][0], dtype=metas[n][1], device=self.device) for n in names]

    def _send(self, key: tuple[str, int], tensors: Iterable[torch.Tensor], stage: int) -> None:
        peer = self.stage_index_to_group_rank[stage]
        while self._in_flight and all(work.is_completed() for work, _ in next(iter(self._in_flight.values()))):
            del self._in_flight[next(iter(self._in_flight))]
        if self.device.type == "cpu":  # gloo says that a send is over only to who waits for it
            for old in [old for old in self._in_flight if old[0] == key[0]]:
                for work, _ in self._in_flight.pop(old):
                    work.wait()
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
        self._awaited.clear()
        self.values.clear()
        self.grads.clear()


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as real numbers: the backends send no complex ones."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class _Runtime(ScheduleRuntime):
    def _initialize_stages(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to infer and no warm-up: stages know their shapes."""


Receives = dict[TorchAction | None, list[tuple[str, int, int]]]  # by the action that they follow


@dataclass(frozen=True)
class _Walk:
    """One schedule. again, away: (stage, microbatch) of what is recomputed and of what is offloaded."""

    runtime: _Runtime
    receives: Receives
    again: frozenset[tuple[int, int]]
    away: frozenset[tuple[int, int]]


class PipelineEngine:
    """The stages of this rank under the schedules of steps of any number of microbatches."""

    def __init__(self, runners: Sequence[StageRunner], device: torch.device, group: Any, recorder: Recorder) -> None:
        self.stages = [PipelineStage(runner, device, group) for runner in runners]
        self.by_number = {stage.stage_index: stage for stage in self.stages}
        self.recorder = recorder
        self._walks: dict[tuple[int, bool], _Walk] = {}
        self._walk: _Walk | None = None
        self._work: Work | None = None

    def run(self, schedule: PipelineSchedule, work: Work) -> None:
        walk = self._walk = self._walk_of(schedule)
        self._work = work
        for stage in self.stages:
            stage.variants = work.variants[stage.stage_index]
        count = schedule.num_microbatches
        try:
            self._receive(walk.receives.get(None, ()))
            walk.runtime._step_microbatches([()] * count, [{}] * count)
            for stage in self.stages:
                stage.finish_sends()
        finally:
            self._work = None
            for stage in self.stages:
                stage.clear()

    def _walk_of(self, schedule: PipelineSchedule) -> _Walk:
        key = (schedule.num_microbatches, schedule.is_forward_only)
        if key not in self._walks:
            runtime = _Runtime(self.stages, schedule.num_microbatches, loss_fn=None, scale_grads=False)
            mapping = dict(enumerate(rank for row in schedule.placements for rank in row))
            runtime.stage_index_to_group_rank = mapping
            for stage in self.stages:
                stage.stage_index_to_group_rank = mapping
            runtime.pipeline_order_with_comms, receives = _torch_order(schedule, runtime.rank)
            functions = {
                "F": self._forward,
                "B": self._backward,
                "I": self._backward,
                "W": self._backward_weight,
                RECOMPUTE: self._recompute,
                OFFLOAD: self._offload,
                LOAD: self._load,
            }
            for kind, function in functions.items():
                runtime.register_custom_function(_KINDS[kind], self._then_receive(function))
            self._walks[key] = _Walk(runtime, receives, schedule.places(RECOMPUTE), schedule.places(OFFLOAD))
        return self._walks[key]

    def _then_receive(self, function: Callable[[Any], None]) -> Any:
        def run(action: Any, ctx: Any) -> None:
            function(action)
            assert self._walk is not None
            if (receives := self._walk.receives.get(action)) is not None:
                self._receive(receives)

        return run

    def _receive(self, receives: Iterable[tuple[str, int, int]]) -> None:
        for kind, number, microbatch in receives:
            self.by_number[number].receive(kind, microbatch)

    def _forward(self, action: Any) -> None:
        work, walk = self._work, self._walk
        assert work is not None and walk is not None
        number, microbatch = action.stage_index, action.microbatch_index
        stage = self.by_number[number]
        stage.wait(RECEIVE_FORWARD, microbatch)
        with self.recorder.action("F", stage.wiring.index, microbatch):
            results = stage.runner.forward(
                microbatch,
                work.variants[number][microbatch],
                work.inputs[microbatch],
                stage.values.pop(microbatch, []),
                training=work.training,
                again=(number, microbatch) in walk.again,
            )
        if (number, microbatch) in walk.away:
            stage.runner.begin_offload(microbatch, work.inputs[microbatch])
        if stage.runner.is_last:
            work.results[microbatch] = results
        elif number + 1 in self.by_number:
            self.by_number[number + 1].values[microbatch] = list(results.values())
        else:
            stage.send_on(microbatch, results.values())

    def _backward(self, action: Any) -> None:
        work = self._work
        assert work is not None
        number, microbatch = action.stage_index, action.microbatch_index
        stage = self.by_number[number]
        stage.wait(RECEIVE_BACKWARD, microbatch)
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

    def _backward_weight(self, action: Any) -> None:
        stage, microbatch = self.by_number[action.stage_index], action.microbatch_index
        with self.recorder.action("W", stage.wiring.index, microbatch):
            stage.runner.backward_weight(microbatch)

    def _recompute(self, action: Any) -> None:
        work, number, microbatch = self._work, action.stage_index, action.microbatch_index
        assert work is not None
        stage = self.by_number[number]
        with self.recorder.action(RECOMPUTE, stage.wiring.index, microbatch):
            stage.runner.recompute(microbatch, work.variants[number][microbatch], work.inputs[microbatch])

    def _offload(self, action: Any) -> None:
        stage, microbatch = self.by_number[action.stage_index], action.microbatch_index
        with self.recorder.action(OFFLOAD, stage.wiring.index, microbatch):
            stage.runner.let_go(microbatch)

    def _load(self, action: Any) -> None:
        stage, microbatch = self.by_number[action.stage_index], action.microbatch_index
        with self.recorder.action(LOAD, stage.wiring.index, microbatch):
            stage.runner.load(microbatch)


def _torch_order(schedule: PipelineSchedule, rank: int) -> tuple[dict[int, list[TorchAction]], Receives]:
    """All ranks' actions, and the receives of this one: (kind, number of the stage, microbatch)."""
    direction, num_stages = schedule.direction, schedule.num_stages
    order: dict[int, list[TorchAction]] = {}
    receives: Receives = {}
    for place, row in enumerate(communicating_lists(schedule)):
        order[place] = []
        for kind, stage, microbatch in row:
            number = direction[microbatch] * num_stages + stage
            if kind in _KINDS:
                order[place].append(TorchAction(number, _KINDS[kind], microbatch))
            elif kind in (RECEIVE_FORWARD, RECEIVE_BACKWARD) and place == rank:
                before = order[place][-1] if order[place] else None
                receives.setdefault(before, []).append((kind, number, microbatch))
    return order, receives
