"""What each pipeline stage runs, receives and sends: pure functions of the graph, the segment programs and the stages.

A value is alive at the cut behind stage s if a stage up to s makes it and a later one uses it. All of them are sent
to stage s+1, which hands on what it does not use itself. Gradients of those that have one travel the same way back; a
stage adds what its own uses contribute before it hands a gradient on, so each sum is complete where the value was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..passes.program import SegmentProgram
from ..profiler.graph import ModelGraph, SegmentInstance

USER_INPUT = "input:"


@dataclass(frozen=True)
class StageWiring:
    """One virtual stage of one direction. Instances by index, values by name, both in a fixed order that neighbours
    share."""

    index: int
    direction: int  # of the microbatches that it runs: 0, or 1 where the schedule has a second pipeline
    rank: int  # pipeline coordinate that runs it
    instances: tuple[int, ...]  # in execution order, prologue instances first
    receives: tuple[str, ...]  # from stage index-1
    sends: tuple[str, ...]  # to stage index+1
    grad_receives: tuple[str, ...]  # the part of sends that has a gradient
    grad_sends: tuple[str, ...]  # the part of receives that has a gradient
    frees: tuple[tuple[str, ...], ...]  # after each instance: values nobody needs any more


@dataclass(frozen=True)
class Wiring:
    """stages: of one direction after the other. with_grad: values through which a gradient flows. backward_runs:
    instances whose backward runs."""

    stages: tuple[StageWiring, ...]
    num_stages: int  # of one direction
    with_grad: frozenset[str]
    backward_runs: frozenset[int]
    loss: str
    outputs: tuple[str, ...]  # further values that the last stage keeps

    def stages_of(self, rank: int) -> list[StageWiring]:
        return [stage for stage in self.stages if stage.rank == rank]

    def number(self, stage: StageWiring) -> int:
        """Its place in `stages`, which is what torch's runtime knows it by."""
        return stage.direction * self.num_stages + stage.index


def wire(
    graph: ModelGraph,
    programs: Mapping[str, SegmentProgram],
    stages: Sequence[Sequence[int]],
    placements: Sequence[Sequence[int]],
    *,
    outputs: Sequence[str] = (),
) -> Wiring:
    """stages: instance indices of each stage, prologue ones optional. placements: for each direction, the pipeline
    coordinate of each stage.

    outputs: values that the last stage keeps beside the loss (for evaluation).
    """
    prologue = {inst.index for inst in graph.instances if graph.segments[inst.segment].is_prologue}
    by_index = {inst.index: inst for inst in graph.instances}
    producer = {name: inst.index for inst in graph.instances for name in inst.outputs}
    stage_of = {i: s for s, row in enumerate(stages) for i in row if i not in prologue}
    missing = sorted(set(by_index) - prologue - set(stage_of))
    assert not missing, f"instances {missing} are on no stage"

    kept = (graph.loss, *(name for name in outputs if name != graph.loss))
    live = _live_instances(graph, prologue, kept, producer)
    with_grad, backward_runs = _gradients(graph, programs, live)

    # the last stage that uses each value; a value lives from the stage after its producer's up to there
    last_stage = len(stages) - 1
    last_use = {name: last_stage for name in kept if not name.startswith(USER_INPUT)}
    for index in live:
        if index in prologue:
            continue
        for name in by_index[index].inputs:
            if name in producer and producer[name] not in prologue:
                last_use[name] = max(last_use.get(name, 0), stage_of[index])
    made_on = {name: stage_of[i] for name, i in producer.items() if i not in prologue}
    cuts: list[tuple[str, ...]] = []
    for cut in range(last_stage):
        names = [name for name, made in made_on.items() if made <= cut < last_use.get(name, -1)]
        cuts.append(tuple(sorted(names, key=lambda name: (producer[name], name))))

    wired = []
    for index, row in enumerate(stages):
        own = [i for i in row if i in live and i not in prologue]
        needed = _prologue_needed(graph, own, prologue, producer, kept if index == last_stage else ())
        run = tuple([*needed, *own])
        receives = cuts[index - 1] if index else ()
        sends = cuts[index] if index < last_stage else ()
        wired.append(
            StageWiring(
                index,
                0,
                placements[0][index],
                run,
                receives,
                sends,
                tuple(name for name in sends if name in with_grad),
                tuple(name for name in receives if name in with_grad),
                _frees(by_index, run, receives, keep={*sends, *(kept if index == last_stage else ())}),
            )
        )
    wired += [
        replace(stage, direction=direction, rank=ranks[stage.index])
        for direction, ranks in enumerate(placements[1:], start=1)
        for stage in wired
    ]
    return Wiring(tuple(wired), len(stages), with_grad, backward_runs, graph.loss, kept[1:])


def _live_instances(
    graph: ModelGraph, prologue: set[int], kept: Sequence[str], producer: Mapping[str, int]
) -> set[int]:
    """Instances whose result is used in the end, or that write a buffer."""
    needed = set(kept)
    live: set[int] = set()
    for inst in reversed(graph.instances):
        if any(name in needed for name in inst.outputs) or graph.segments[inst.segment].mutated_buffers:
            live.add(inst.index)
            needed.update(inst.inputs)
    return live


def _gradients(
    graph: ModelGraph, programs: Mapping[str, SegmentProgram], live: set[int]
) -> tuple[frozenset[str], frozenset[int]]:
    with_grad = {graph.loss}
    runs: set[int] = set()
    for inst in reversed(graph.instances):
        program = programs[inst.segment]
        if inst.index not in live or program.backward is None:
            continue
        if not any(inst.outputs[slot] in with_grad for slot in program.tangent_outputs):
            continue
        runs.add(inst.index)
        for name, has_grad in zip(inst.inputs, program.input_grads, strict=True):
            if has_grad:
                with_grad.add(name)
    return frozenset(with_grad), frozenset(runs)


def _prologue_needed(
    graph: ModelGraph, own: Sequence[int], prologue: set[int], producer: Mapping[str, int], kept: Sequence[str]
) -> list[int]:
    by_index = {inst.index: inst for inst in graph.instances}
    found: set[int] = set()
    names = [*kept, *(name for i in own for name in by_index[i].inputs)]
    while names:
        made_by = producer.get(names.pop())
        if made_by in prologue and made_by not in found:
            found.add(made_by)
            names.extend(by_index[made_by].inputs)
    return sorted(found)


def prologue_needed(graph: ModelGraph, names: Sequence[str]) -> list[int]:
    """The prologue instances that compute these values."""
    prologue = {inst.index for inst in graph.instances if graph.segments[inst.segment].is_prologue}
    producer = {name: inst.index for inst in graph.instances for name in inst.outputs}
    return _prologue_needed(graph, (), prologue, producer, names)


def _frees(
    by_index: Mapping[int, SegmentInstance], run: Sequence[int], receives: Sequence[str], keep: set[str]
) -> tuple[tuple[str, ...], ...]:
    last: dict[str, int] = {name: 0 for name in receives}  # a received value that is only handed on is in keep
    for position, index in enumerate(run):
        for name in (*by_index[index].inputs, *by_index[index].outputs):
            if not name.startswith(USER_INPUT):
                last[name] = position
    rows: list[list[str]] = [[] for _ in run]
    for name, position in last.items():
        if name not in keep and run:
            rows[position].append(name)
    return tuple(tuple(row) for row in rows)
