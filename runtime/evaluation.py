"""Evaluation: the model as model.eval() has it, over the stages, parameters and buffers that train.

Its graph is another capture (no dropout, running statistics, nothing written), made and placed when it is first asked
for. A segment runs where its parameters and buffers are; one that has none where the one before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import ExitCode, ShardwrightError
from ..passes.program import SegmentProgram
from ..plans.axes import batch_axes, inner_axes
from ..profiler.graph import Leaf, ModelGraph
from ..profiler.initial_values import initial_tensors
from ._torch import tree_unflatten
from .batch import MicrobatchPart
from .buffers import BorrowingBuffers, buffer_names
from .conditions import Conditions
from .microbatches import Keys, Microbatches, Rebuild
from .pipeline import PipelineEngine, Work
from .relayout import all_gather_dim
from .shards import chunk_bounds
from .stage import StageRunner
from .totals import BatchTotals, counting_stage
from .trained import Trained
from .wiring import USER_INPUT, wire

_FIRST_INDEX = 1 << 20  # of this graph's instances: others than those that train
_CONSTANT = "constant:"


@dataclass(frozen=True)
class Evaluation:
    """What is needed to run it. output_dims: value -> the dimension that holds samples, of those that have one."""

    graph: ModelGraph
    programs: Mapping[str, SegmentProgram]
    rebuild: Rebuild
    output_dims: Mapping[str, int]


class Evaluator:
    def __init__(self, program: Trained, evaluation: Evaluation) -> None:
        self.program, self.evaluation = program, evaluation
        grid, rank = program.grid, program.grid.coord("pp")
        graph = self.graph = _renamed(evaluation.graph)
        kept = [name for name in graph.outputs if not name.startswith(USER_INPUT)]
        stages = follow_stages(program.graph, [stage.segments for stage in program.plan.stages], graph)
        self.wiring = wire(graph, evaluation.programs, stages, [program.stage_rank], outputs=kept)
        own = self.wiring.stages_of(rank)
        counting = counting_stage(graph, self.wiring, rank)
        counted = [counting] if counting is not None else []
        by_index = {inst.index: inst for inst in graph.instances}
        program.store.add_instances({i: by_index[i].params for s in (*own, *counted) for i in s.instances})
        self.buffers = BorrowingBuffers(program.buffers)  # its own are no state of the program
        self._read_buffers(buffer_names(graph, [*own, *counted]))
        self._keys = Keys(graph, program.workload.seed, program.device)
        self.runners = [self._runner(stage) for stage in own]
        self.conditions = Conditions(graph, program.device, grid.ranks.numel())
        of_each = program.plan.loss_over == "each"
        self.totals = BatchTotals(graph, counting, self._runner, self.conditions, of_each=of_each)
        self.microbatches = Microbatches(
            graph, evaluation.programs, program.microbatch_size, grid, program.device, evaluation.rebuild,
            program.workload.call.form,
        )  # fmt: skip
        self._engine: PipelineEngine | None = None

    def _runner(self, stage: Any) -> StageRunner:
        program = self.program
        return StageRunner(self.graph, self.wiring, stage, program.store, self.buffers, self._keys, program.host)

    def _read_buffers(self, names: Sequence[str]) -> None:
        """Those that training reads are shared with it; others are read here alone, and never change."""
        program = self.program
        missing = [name for name in names if name not in program.buffers.tensors]
        own = {name: self.graph.constants[name] for name in missing if name in self.graph.constants}
        rest = [name for name in missing if name not in own]
        if any(name in program.written for name in rest):
            raise _refused(f"buffer {rest[0]} is written by training on another pipeline rank", "pp=1")
        values = dict(initial_tensors(program.workload.model, rest, seed=program.workload.seed)) if rest else {}
        for name, value in {**own, **values}.items():
            self.buffers.tensors[name] = value.detach().to(program.device)

    # a batch

    @torch.no_grad()
    def losses(self, batch: Any) -> tuple[list[MicrobatchPart], dict[int, dict[str, torch.Tensor]]]:
        """(microbatches, values that the last stage keeps, of each)."""
        parts = self.microbatches.split(batch)
        return parts, self._run(parts)

    @torch.no_grad()
    def outputs(self, batch: Any) -> list[Any]:
        """What the model returns, of each microbatch, on ranks of the last stage: this data-parallel rank's samples."""
        parts, results = self.losses(batch)
        return [self._output(parts[k], results[k]) for k in sorted(results)]

    def _output(self, part: MicrobatchPart, values: Mapping[str, torch.Tensor]) -> Any:
        whole: dict[str, torch.Tensor] = {}
        shards = self._shards_of(part)

        def leaf(item: Any) -> Any:
            if not isinstance(item, Leaf):
                return item
            if item.name not in whole:
                entry = item.name.removeprefix(USER_INPUT)
                whole[item.name] = values[item.name] if item.name in values else part.tensors[entry]
                if item.name in values:
                    local = values[item.name]
                    whole[item.name] = self._own_samples(item.name, local, part.size, shards[item.name])
            return whole[item.name]

        leaves = [leaf(item) for item in self.graph.output_leaves]
        return tree_unflatten(leaves, self.graph.output_form)[1]

    def _shards_of(self, part: MicrobatchPart) -> dict[str, Mapping[str, int]]:
        """How values lie in the programs of this microbatch's shape, which may have been placed anew: mesh axis ->
        dimension."""
        programs = self.microbatches.programs(part)
        return {
            name: dims
            for instance in self.graph.instances
            for name, dims in zip(instance.outputs, programs[instance.segment].output_shards, strict=True)
        }

    def _own_samples(self, name: str, local: torch.Tensor, size: int, shards: Mapping[str, int]) -> torch.Tensor:
        """Whole on the axes that cut parameters or sequences, this rank's samples over those that carry the batch."""
        batch = self.program.grid.batch
        for axis in reversed(inner_axes()):  # each cut what those before it left
            if axis in shards:
                local = self._gathered(local, shards[axis], axis)
        dim = self.evaluation.output_dims.get(name, -1)
        if dim >= 0 and not set(batch_axes()) & set(shards) and size % batch.size == 0:
            start, stop = chunk_bounds(local.shape[dim], batch.size, batch.index)
            local = local.narrow(dim, start, stop - start)
        return local

    def _gathered(self, local: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        grid = self.program.grid
        length = torch.tensor([local.shape[dim]], device=local.device)
        torch.distributed.all_reduce(length, group=grid.group(axis))
        shape = tuple(int(length) if d == dim else s for d, s in enumerate(local.shape))
        return all_gather_dim(local, shape, dim, grid.group(axis), grid.size(axis))

    def _run(self, parts: list[MicrobatchPart]) -> dict[int, dict[str, torch.Tensor]]:
        program = self.program
        self.totals.fill(parts, self.microbatches)
        variants = [self.microbatches.variants(part, self.runners) for part in parts]
        inputs = [self.microbatches.inputs(part, row) for part, row in zip(parts, variants, strict=True)]
        self._keys.begin(program.step_index, len(parts))
        try:
            with self.conditions.noting():
                run = self._run_stages if program.grid.size("pp") > 1 else self._run_alone
                results = run(parts, inputs, variants)
        finally:
            for runner in self.runners:
                runner.clear()
        self.conditions.look_at_forward()
        return results

    def _run_alone(self, parts: Any, inputs: Any, variants: Any) -> dict[int, dict[str, torch.Tensor]]:
        results = {}
        for k, (row, entries) in enumerate(zip(variants, inputs, strict=True)):
            values: dict[str, torch.Tensor] = {}
            for runner, variant in zip(self.runners, row, strict=True):
                values = runner.forward(k, variant, entries, list(values.values()), training=False)
            results[k] = values
        return results

    def _run_stages(self, parts: Any, inputs: Any, variants: Any) -> dict[int, dict[str, torch.Tensor]]:
        program = self.program
        if self._engine is None:
            group = program.grid.group("pp")
            self._engine = PipelineEngine(self.runners, program.device, group, program.recorder)
        by_number = {r.number: [row[i] for row in variants] for i, r in enumerate(self.runners)}
        work = Work(inputs, by_number, _no_gradient, False)
        self._engine.run(program.schedule(len(parts), training=False), work)
        return work.results


def follow_stages(trained: ModelGraph, stages: Sequence[Sequence[int]], graph: ModelGraph) -> list[list[int]]:
    """Instances of graph for each stage. Raises ShardwrightError where one would need what two stages hold apart."""
    by_index = {inst.index: inst for inst in trained.instances}
    homes: dict[str, set[int]] = {}
    for number, row in enumerate(stages):
        for index in row:
            for name in (*by_index[index].params, *by_index[index].buffers):
                homes.setdefault(trained.tied.get(name, name), set()).add(number)
    found: list[list[int]] = [[] for _ in stages]
    current = 0
    for inst in graph.instances:
        if graph.segments[inst.segment].is_prologue:
            continue
        names = [graph.tied.get(name, name) for name in inst.params]
        lost = next((name for name in names if name not in homes), None)
        if lost is not None:
            raise _refused(
                f"parameter {lost} is read by evaluation, and not by training", "a training forward that uses it"
            )
        held = [homes[name] for name in [*names, *inst.buffers] if name in homes]
        places = set.intersection(*held) if held else set(range(len(stages)))
        later = [place for place in places if place >= current]
        if not later:
            raise _refused(f"{inst.module_path or 'a part of the model'} holds parameters of several stages", "pp=1")
        current = min(later)
        found[current].append(inst.index)
    return found


def _renamed(graph: ModelGraph) -> ModelGraph:
    """Instances and constants under names that training does not use."""

    def name(buffer: str) -> str:
        return f"{_CONSTANT}evaluation.{buffer.removeprefix(_CONSTANT)}" if buffer.startswith(_CONSTANT) else buffer

    return replace(
        graph,
        instances=[
            replace(i, index=i.index + _FIRST_INDEX, buffers=tuple(map(name, i.buffers))) for i in graph.instances
        ],
        buffers={name(buffer): info for buffer, info in graph.buffers.items()},
        constants={name(constant): value for constant, value in graph.constants.items()},
    )


def _no_gradient(microbatch: int) -> torch.Tensor:
    raise AssertionError("an evaluation has no backward")


def _refused(what: str, works: str) -> ShardwrightError:
    return ShardwrightError(
        what,
        means="the model in evaluation mode does not run on the stages of this plan",
        change="the plan's stages, or the model",
        works=works,
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


MakeEvaluation = Callable[[], Evaluation]
