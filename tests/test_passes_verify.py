"""Every built segment holds the collectives, in number and in bytes, that its plan implies and the planner counts."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import cells
from simulated_ranks import mesh
from test_check_matrix import MODELS, spec
from torch import fx

from shardwright import api, tasks
from shardwright.passes.build import build_segment_programs
from shardwright.passes.program import SegmentProgram
from shardwright.passes.redistribute import MeshAxis
from shardwright.passes.shard import ShardContext
from shardwright.passes.verify import Collective, implied_collectives, moved_collectives, totals, verify
from shardwright.planner.sharding.mesh import Axis, Mesh
from shardwright.planner.sharding.routes import Placed, moves
from shardwright.plans.document import Plan
from shardwright.plans.placements import read_placements
from shardwright.profiler.batches import resize_batch
from shardwright.profiler.graph import ModelGraph

LAYOUTS = ({"dp": 1, "tp": 2}, {"dp": 2, "tp": 2}, {"dp": 1, "tp": 4})
CPU = torch.device("cpu")


EVERY = [(model, layout) for model in MODELS for layout in LAYOUTS]
# each model once, each layout several times
EACH_ONCE = [(model, LAYOUTS[k % len(LAYOUTS)]) for k, model in enumerate(MODELS)]


@functools.cache
def planned(model: str, dp: int, tp: int) -> tuple[Plan, ModelGraph]:
    workload = tasks.check_workload(spec(model))
    force = {"pp": "1", "dp": str(dp), "tp": str(tp), "global_microbatch": "4"}
    plan = api.plan(workload, f"{dp * tp}xCPU", force=force)
    return plan, api._capture_for_running(resize_batch(workload, plan.microbatch.size), plan.fusions)


def built(
    model: str, layout: dict[str, int]
) -> tuple[ModelGraph, list[tuple[ShardContext, dict[str, SegmentProgram]]]]:
    """What the first and the last rank run."""
    return _built(model, layout["dp"], layout["tp"])


@functools.cache
def _built(model: str, dp: int, tp: int) -> tuple[ModelGraph, list[tuple[ShardContext, dict[str, SegmentProgram]]]]:
    layout = {"dp": dp, "tp": tp}
    plan, graph = planned(model, **layout)
    solutions = tuple(read_placements(plan.placements, len(plan.placement_axes)))
    found = []
    for axes in (mesh(layout)[0], mesh(layout)[-1]):
        by_name = {axis.name: axis for axis in axes}
        context = ShardContext(tuple(by_name[name] for name in plan.placement_axes), solutions, CPU)
        found.append((context, build_segment_programs(graph, plan, by_name, CPU)))
    return graph, found


@pytest.mark.parametrize(("model", "layout"), cells(EVERY, EACH_ONCE), ids=str)
def test_programs_hold_the_collectives_that_the_planner_counts(model: str, layout: dict[str, int]) -> None:
    graph, ranks = built(model, layout)
    for context, programs in ranks:
        for name, program in programs.items():
            segment = graph.segments[name]
            assert Counter(program.collectives) == Counter(implied_collectives(segment, context))
            nodes = {node.name: node for node in segment.joint.graph.nodes}
            for found, counted in zip(
                moved_collectives(segment, context), moves(_placed(segment, context)), strict=True
            ):
                assert found[:3] == (counted.phase, counted.axis, counted.kind)
                if _divides(nodes[counted.node], 4):  # else shards are padded, and longer than their share
                    assert found.num_bytes == counted.full_bytes
    assert [p.collectives for p in ranks[0][1].values()] == [p.collectives for p in ranks[1][1].values()]


def test_some_segments_have_collectives_of_every_kind() -> None:
    found = {
        (c.axis, c.kind)
        for layout in LAYOUTS[:2]
        for program in built("tiny-llama", layout)[1][0][1].values()
        for c in program.collectives
    }
    assert {kind for _, kind in found} >= {"all_reduce", "all_gather"}
    assert {axis for axis, _ in found} == {"dp", "tp"}


def _placed(segment: Any, context: ShardContext) -> Placed:
    axes = tuple(Axis(axis.name, axis.size, lambda kind, num_bytes: 0.0) for axis in context.axes)
    return Placed(segment, Mesh(axes, 1, 1, lambda *_: 0.0, lambda _: 0.0), context.solutions)


def _divides(node: fx.Node, parts: int) -> bool:
    """Every dimension of every result by so many."""
    value = node.meta["val"]
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return all(size % parts == 0 for tensor in tensors if isinstance(tensor, torch.Tensor) for size in tensor.shape)


def _twice(program: SegmentProgram) -> None:
    node = next(n for n in program.forward.graph.nodes if "all_" in str(n.target))
    with program.forward.graph.inserting_after(node):
        again = program.forward.graph.call_function(node.target, node.args)
    again.meta = dict(node.meta)


def _none(program: SegmentProgram) -> None:
    node = next(n for n in program.forward.graph.nodes if "all_" in str(n.target))
    node.replace_all_uses_with(node.args[0])
    program.forward.graph.erase_node(node)


def _longer(program: SegmentProgram) -> None:
    node = next(n for n in program.forward.graph.nodes if "all_" in str(n.target))
    node.args[0].meta["val"] = torch.empty(7, 7, device="meta")


@pytest.mark.parametrize("harm", [_twice, _none, _longer])
def test_a_collective_too_many_too_few_or_too_long_is_refused(harm: Callable[[SegmentProgram], None]) -> None:
    graph, ranks = built("tiny-llama", LAYOUTS[0])
    context, programs = ranks[0]
    name, program = next((n, p) for n, p in programs.items() if any(c.phase == "forward" for c in p.collectives))
    harmed = copy.copy(program)
    object.__setattr__(harmed, "forward", copy.deepcopy(program.forward))
    harm(harmed)
    with pytest.raises(AssertionError, match="implied by the plan"):
        verify(graph.segments[name], context, harmed.forward, [harmed.backward], False)


def test_totals_add_up_by_phase_axis_and_kind() -> None:
    one = Collective("forward", "tp", "all_reduce", 8)
    assert totals([one, one._replace(num_bytes=4), one._replace(axis="dp")]) == {
        ("forward", "dp", "all_reduce"): (1, 8),
        ("forward", "tp", "all_reduce"): (2, 12),
    }


def test_recomputation_repeats_no_more_than_the_forward() -> None:
    from shardwright.passes.build import build_segment_program

    graph, ranks = built("tiny-llama", LAYOUTS[0])
    for context, programs in ranks:
        for name, program in programs.items():
            again = build_segment_program(graph.segments[name], context, recompute=True)
            once, twice = Counter(program.collectives), Counter(again.collectives)
            repeated = twice - once
            for collective, count in repeated.items():
                assert collective.phase == "backward"
                assert count <= once[collective._replace(phase="forward")]


def test_an_axis_of_one_rank_needs_no_collective() -> None:
    plan, graph = planned("tiny-gpt2", 1, 2)
    alone = {name: MeshAxis(name, 1, 0, name) for name in plan.placement_axes}
    programs = build_segment_programs(graph, plan, alone, CPU)
    assert not any(program.collectives for program in programs.values())
