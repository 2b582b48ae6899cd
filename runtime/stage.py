"""One virtual stage of one direction on one rank: runs its segment instances forward and backward for one microbatch at
a time.

Knows nothing of other ranks: what it receives and what it has to send are lists of tensors in the wiring's order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..passes.program import SegmentProgram, program_of
from ..profiler.graph import ModelGraph, SegmentInstance
from .buffers import Buffers
from .offload import HostCopy, HostMemory
from .parameters import ParameterStore
from .specs import ParamUse, param_uses
from .wiring import USER_INPUT, StageWiring, Wiring

KeyOf = Callable[[int, int], torch.Tensor]  # (microbatch, instance) -> the generator's key
Meta = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Step:
    """One instance of the stage, with everything looked up."""

    instance: SegmentInstance
    program: SegmentProgram
    frees: tuple[str, ...]
    runs_backward: bool
    tangents: tuple[str, ...]  # values, in the backward's order
    input_grads: tuple[tuple[int, str], ...]  # input slot and value, where a gradient goes on
    uses: tuple[ParamUse, ...]


@dataclass
class _Kept:
    """What the backward of one instance and microbatch needs."""

    step: Step
    buffers: list[torch.Tensor]
    key: torch.Tensor
    saved: list[torch.Tensor]


@dataclass
class _Inputs:
    """What a forward needs to run again. buffers: of each step, as they were."""

    received: list[torch.Tensor]
    buffers: list[list[torch.Tensor]]


@dataclass
class Variant:
    """The stage's steps for one shape of microbatch, and the local shapes of all values."""

    steps: list[Step]
    metas: Mapping[str, Meta]
    grad_metas: Mapping[str, Meta]
    input_shapes: Mapping[str, tuple[int, ...]]  # local, of the user inputs that the steps read
    zeros: dict[str, torch.Tensor] = field(default_factory=dict)


class StageRunner:
    def __init__(
        self,
        graph: ModelGraph,
        wiring: Wiring,
        stage: StageWiring,
        store: ParameterStore,
        buffers: Buffers,
        key_of: KeyOf,
        host: HostMemory,
    ) -> None:
        self.graph, self.wiring, self.stage = graph, wiring, stage
        self.store, self.buffers, self.key_of = store, buffers, key_of
        self.is_last = stage.index == wiring.num_stages - 1
        self.number = wiring.number(stage)
        self.on_forward: Callable[[], None] = _nothing
        self._kept: dict[int, list[_Kept]] = {}
        self._deferred: dict[int, list[_Kept]] = {}
        self._again: dict[int, _Inputs] = {}
        self._away: dict[int, HostCopy] = {}  # the saved tensors of what is kept
        self._host = host
        self._flushes = store.flush_plan([index for index in stage.instances if index in wiring.backward_runs])

    def variant(self, programs: Mapping[str, SegmentProgram]) -> Variant:
        by_index = {inst.index: inst for inst in self.graph.instances}
        runs = self.wiring.backward_runs
        steps = []
        for index, frees in zip(self.stage.instances, self.stage.frees, strict=True):
            instance = by_index[index]
            program = program_of(programs, instance)
            steps.append(
                Step(
                    instance,
                    program,
                    frees,
                    index in runs,
                    tuple(instance.outputs[slot] for slot in program.tangent_outputs),
                    tuple((s, n) for s, n in enumerate(instance.inputs) if program.input_grads[s]),
                    param_uses(self.store.specs, instance, program, index in runs, self.store.grid.sizes),
                )
            )
        shapes = {
            name: shape
            for step in steps
            for name, (shape, _) in zip(step.instance.inputs, step.program.input_meta, strict=True)
            if name.startswith(USER_INPUT)
        }
        return Variant(steps, value_metas(self.graph, programs), grad_metas(self.graph, programs), shapes)

    def forward(
        self,
        microbatch: int,
        variant: Variant,
        inputs: Mapping[str, torch.Tensor],
        received: list[torch.Tensor],
        *,
        training: bool = True,
        again: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Returns the values that the stage sends on or, on the last stage, keeps. Buffers are written when training.

        Empties `received`, so that each value can go once it has been used. again: nothing is kept for the backward;
        recompute() comes before it.
        """
        env = dict(inputs)
        env.update(zip(self.stage.receives, received, strict=True))
        if again:
            self._again[microbatch] = _Inputs(list(received), [])
        received.clear()
        kept: list[_Kept] = []
        for position, step in enumerate(variant.steps):
            buffers = self.buffers.read(step.instance.buffers)
            updates, item = self._run(microbatch, variant, position, env, buffers)
            if training:
                if updates:
                    self.buffers.write(step.instance, step.program.mutated_buffers, updates)
                if again:
                    self._again[microbatch].buffers.append(buffers)
                elif step.runs_backward:
                    kept.append(item)
            del updates, item
        if training:
            if not again:
                self._kept[microbatch] = kept
            self.on_forward()
        wanted = self.stage.sends if not self.is_last else (self.wiring.loss, *self.wiring.outputs)
        return {name: env[name] for name in wanted}

    def _run(
        self,
        microbatch: int,
        variant: Variant,
        position: int,
        env: dict[str, torch.Tensor],
        buffers: list[torch.Tensor],
    ) -> tuple[list[torch.Tensor], _Kept]:
        """One step's forward: new values of its buffers, and what its backward needs."""
        steps = variant.steps
        step = steps[position]
        instance = step.instance
        params = self.store.acquire(instance.index, step.uses)
        if position + 1 < len(steps):  # after acquire: the buffer that these came in is free again
            self.store.prefetch(steps[position + 1].instance.index)
        key = self.key_of(microbatch, instance.index)
        outputs, updates, saved = step.program.run_forward(params, buffers, [env[n] for n in instance.inputs], key)
        self.store.release(instance.index)
        env.update(zip(instance.outputs, outputs, strict=True))
        for name in step.frees:
            del env[name]
        return updates, _Kept(step, buffers, key, saved)

    def recompute(self, microbatch: int, variant: Variant, inputs: Mapping[str, torch.Tensor]) -> None:
        """After forward(again=True): the same forward, with the same buffers and keys, and kept this time."""
        before = self._again.pop(microbatch)
        env = dict(inputs)
        env.update(zip(self.stage.receives, before.received, strict=True))
        before.received.clear()
        kept = self._kept[microbatch] = []
        for position, step in enumerate(variant.steps):
            _, item = self._run(microbatch, variant, position, env, before.buffers[position])
            if step.runs_backward:
                kept.append(item)
            del _, item
        self.on_forward()

    def begin_offload(self, microbatch: int, inputs: Mapping[str, torch.Tensor]) -> None:
        """After forward(): what it kept starts on its way to host memory."""
        saved = [tensor for item in self._kept[microbatch] for tensor in item.saved]
        self._away[microbatch] = self._host.copy(saved, inputs.values())

    def let_go(self, microbatch: int) -> None:
        for item in self._kept[microbatch]:
            item.saved = []
        self._away[microbatch].let_go()

    def load(self, microbatch: int) -> None:
        self._away[microbatch].load()
        self.on_forward()

    def _arrived(self, microbatch: int) -> list[_Kept]:
        """What a forward kept, on the device."""
        kept = self._kept.pop(microbatch)
        if microbatch in self._away:
            tensors = self._away.pop(microbatch).tensors()
            for item in kept:
                count = item.step.program.num_saved
                item.saved, tensors = tensors[:count], tensors[count:]
        return kept

    def backward(
        self, microbatch: int, variant: Variant, received: Mapping[str, torch.Tensor], *, defer: bool = False
    ) -> dict[str, torch.Tensor]:
        """received: gradients of sent values, or of the loss. Returns gradients of received values.

        Parameter gradients are accumulated as they come; with defer backward_weight() computes those of segments whose
        backward is split.
        """
        grads = dict(received)
        owned: set[str] = set()
        kept = self._arrived(microbatch)
        deferred = self._deferred.setdefault(microbatch, []) if defer else []
        while kept:
            item = kept.pop()
            step, program = item.step, item.step.program
            index = step.instance.index
            tangents = []
            for name in step.tangents:
                tangent = grads.pop(name, None)
                tangents.append(self._zero(variant, name) if tangent is None else tangent)
            params = self.store.acquire(index, step.uses)
            if kept:
                self.store.prefetch(kept[-1].step.instance.index)
            if defer and program.split is not None:
                of_inputs, carried = program.run_backward_input(params, item.buffers, item.key, item.saved, tangents)
                deferred.append(_Kept(step, item.buffers, item.key, carried))
                del carried
            else:
                into = self.store.gradient_memory(step.uses, program.into_slots)
                of_params, of_inputs = program.run_backward(params, item.buffers, item.key, item.saved, tangents, into)
                self._accumulate(step, of_params)
                del of_params
            self.store.release(index)
            del item, params, tangents
            for slot, name in step.input_grads:
                grad = of_inputs[slot]
                if grad is None:
                    continue
                held = grads.get(name)
                if held is None:
                    grads[name] = grad  # may share memory with another gradient: not written to
                elif name in owned:
                    held.add_(grad)
                else:
                    grads[name] = held + grad
                    owned.add(name)
        sent = {}
        for name in self.stage.grad_sends:
            grad = grads.get(name)
            sent[name] = self._zero(variant, name) if grad is None else grad
        return sent

    def backward_weight(self, microbatch: int) -> None:
        """The parameters' gradients of a microbatch after its backward(defer=True)."""
        rest = self._deferred.pop(microbatch)
        while rest:
            item = rest.pop(0)
            step, program, index = item.step, item.step.program, item.step.instance.index
            assert program.split is not None
            reads = program.split.reads_params
            params = self.store.acquire(index, step.uses) if reads else [None] * program.num_params
            into = self.store.gradient_memory(step.uses, program.split.into_slots)
            of_params = program.run_backward_weight(params, item.buffers, item.key, item.saved, into)
            if reads:
                self.store.release(index)
            del item, params
            self._accumulate(step, of_params)

    def _accumulate(self, step: Step, grads: list[torch.Tensor | None]) -> None:
        self.store.accumulate(step.instance.index, step.uses, grads)
        for unit in self._flushes[step.instance.index]:
            unit.flush()

    def _zero(self, variant: Variant, name: str) -> torch.Tensor:
        if name not in variant.zeros:
            shape, dtype = variant.grad_metas[name]
            variant.zeros[name] = torch.zeros(shape, dtype=dtype, device=self.store.device)
        return variant.zeros[name]

    def kept_bytes(self) -> int:
        """Bytes of saved tensors, each storage once."""
        rows = (*self._kept.values(), *self._deferred.values())
        tensors = [tensor for row in rows for item in row for tensor in item.saved]
        tensors += [tensor for inputs in self._again.values() for tensor in inputs.received]
        storages = {}
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values()) + sum(copy.loaded_bytes() for copy in self._away.values())

    def clear(self) -> None:
        for copy in self._away.values():  # after a step that did not come to its end
            copy.wait()
        self._again.clear()
        self._away.clear()
        self._kept.clear()
        self._deferred.clear()


def value_metas(graph: ModelGraph, programs: Mapping[str, SegmentProgram]) -> dict[str, Meta]:
    """Local shape and dtype of each value on this rank's coordinates: the same on every stage."""
    metas: dict[str, Meta] = {}
    for inst in graph.instances:
        metas.update(zip(inst.outputs, programs[inst.segment].output_meta, strict=True))
    return metas


def grad_metas(graph: ModelGraph, programs: Mapping[str, SegmentProgram]) -> dict[str, Meta]:
    """Local shape and dtype of the gradient of each value that takes one; it may be sharded unlike the value."""
    metas: dict[str, Meta] = {}
    for inst in graph.instances:
        program = programs[inst.segment]
        found = program.tangent_meta or [program.output_meta[slot] for slot in program.tangent_outputs]
        metas.update(zip((inst.outputs[slot] for slot in program.tangent_outputs), found, strict=True))
    return metas


def _nothing() -> None:
    pass
