"""What the backward makes again: the choices are the best there are, the numbers stay, the bytes are those counted."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from unittest import mock

import pytest
import torch
from captured import graph_of, recorded
from compared import assert_same_numbers, compared, plan_once
from matrix import cells
from random_placements import random_solutions
from test_passes_shard import MESHES, compare, run_program

from shardwright.costmodel.model import CostModel
from shardwright.costmodel.segment import SegmentCost
from shardwright.passes.build import build_segment_program
from shardwright.passes.redistribute import MeshAxis
from shardwright.passes.shard import ShardContext
from shardwright.planner.memory.options import ladders
from shardwright.planner.sharding import sharder as sharder_module
from shardwright.planner.sharding.cost import evaluate
from shardwright.planner.sharding.recompute_cut import Unit, Values
from shardwright.planner.sharding.routes import Placed
from shardwright.planner.sharding.sharder import Sharder
from shardwright.planner.stages.chain import levels_of, model_shape
from shardwright.plans.axes import MeshShape
from shardwright.plans.document import Plan
from shardwright.plans.placements import kept_key
from shardwright.profiler.graph import ModelGraph
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.op_view import is_op

OTHERS = ["tiny-gpt2", "tiny-t5", "tiny-mixtral"]


def random_values(seed: int) -> Values:
    """Up to eight units, each of one or two values, that read earlier ones."""
    draw = random.Random(seed)
    given = [f"given{k}" for k in range(draw.randint(1, 2))]
    num_bytes, made_by, units = {name: draw.randint(1, 9) for name in given}, {}, {}
    for k in range(draw.randint(1, 8)):
        reads = draw.sample(list(num_bytes), min(len(num_bytes), draw.randint(1, 3)))
        units[f"op{k}"] = Unit(draw.choice([0, 1, 10, 50]), reads)
        for value in range(draw.randint(1, 2)):
            num_bytes[f"op{k}.{value}"], made_by[f"op{k}.{value}"] = draw.randint(1, 9), f"op{k}"
    needed = draw.sample(list(num_bytes), draw.randint(1, len(num_bytes)))
    return Values(units, num_bytes, made_by, needed)


def test_choices_are_those_of_all_that_nothing_beats_at_any_price() -> None:
    """At every price of a byte, the choices found do as well as any set of units."""
    for seed in range(200):
        values = random_values(seed)
        every = [
            values.figures(chosen)
            for size in range(len(values.units) + 1)
            for chosen in itertools.combinations(values.units, size)
        ]
        for price in (0.1, 1, 5, 20):
            best = min(each.seconds + price * each.num_bytes for each in every)
            cut = values.figures(values.cut(seconds=1.0, per_byte=price))
            assert cut.seconds + price * cut.num_bytes == pytest.approx(best, rel=1e-6, abs=1e-6), (seed, price)
        found = [values.figures(()), *(values.figures(choice) for choice in values.choices())]
        assert found[-1].num_bytes == min(each.num_bytes for each in every)
        assert all(one.seconds <= other.seconds for one, other in itertools.pairwise(found))
        slopes = [(a.num_bytes - b.num_bytes) / max(b.seconds - a.seconds, 1e-9) for a, b in itertools.pairwise(found)]
        assert slopes == sorted(slopes, reverse=True), seed
        for each in found:
            assert not any(o.seconds < each.seconds and o.num_bytes <= each.num_bytes for o in every), seed


def test_between_two_corners_stand_choices_that_make_some_of_what_the_next_does() -> None:
    """Two products of one operand cost and free alike: at no price is one of them alone the best choice."""
    units = {"cheap": Unit(1, ["given"]), "gate": Unit(50, ["given"]), "up": Unit(50, ["given"])}
    num_bytes = {"given": 1.0, "cheap.0": 8.0, "gate.0": 8.0, "up.0": 8.0}
    made_by = {f"{name}.0": name for name in units}
    values = Values(units, num_bytes, made_by, ["given", *made_by])
    counts = [len(choice) for choice in values.choices()]
    assert counts == [1, 2, 3]


def test_what_the_end_of_a_model_makes_again_at_once_comes_last_on_the_ladder() -> None:
    """The loss's backward follows its forward: to make logits again frees nothing while they are not needed."""
    graph = graph_of("tiny-llama", 4)
    (solution, *_) = Sharder(graph, CostModel(parse_hardware("1xCPU"))).frontier(MeshShape.of({}), 4)
    shape = model_shape(graph)
    (ladder,) = ladders(shape, [solution], "auto")
    levels = [levels_of(shape, rung) for rung in ladder.rungs]
    heads = [level[-1] for level in levels]
    first = next(k for k in range(1, len(heads)) if is_late(solution.costs[shape.segments[-1]], heads[k]))
    assert all(level[1:-1] == levels[-1][1:-1] for level in levels[first:])
    assert heads[first:] and heads == sorted(heads)


def is_late(cost: SegmentCost, level: int) -> bool:
    """Does it hold no less at once than with nothing made again?"""
    if level < 0:
        return False
    point = cost.recompute_points[level]
    held, plain = cost.held_at(point), cost.held_at(None)
    at_once = point.saved_bytes + max(held.forward, held.backward)
    return at_once >= cost.saved_bytes + max(plain.forward, plain.backward)


def some_of(segment, solutions, seed: int) -> list[str]:
    draw = random.Random(seed)
    names = []
    for node in segment.joint.graph.nodes:
        if is_op(node) and node.meta.get("phase") != "backward" and draw.random() < 0.6:
            names.append(node.name)
        key = kept_key(node.name, 0)
        if draw.random() < 0.6 and any((segment.name, key) in s.places for s in solutions):
            names.append(key)
    return names


@pytest.mark.parametrize("preset", cells(["tiny-llama", *OTHERS], ["tiny-llama"]))
def test_whatever_is_made_again_the_numbers_stay(preset: str) -> None:
    for i, one in enumerate(recorded(preset)):
        sizes = MESHES[i % len(MESHES)]
        solutions = random_solutions(one.segment, sizes, i)
        names = some_of(one.segment, solutions, i)
        found, _ = run_program(one, solutions, sizes, names)
        compare(one, found)


def test_between_all_and_nothing_a_plan_makes_some_results_again_and_the_numbers_stay(tmp_path: Path) -> None:
    """Memory for half of what recomputation can free; the program's losses and gradients are the model's."""
    spec = {"model": "preset:tiny-llama", "global_batch": 8, "seq_len": 256}

    def plan(limit_bytes: int | None = None, recompute: str = "auto") -> Plan:
        force = {"tp": "2", "recompute": recompute, "schedule": "1f1b", "microbatch": "8"}
        return plan_once(spec, "2xCPU", force, memory_limit_bytes=limit_bytes)

    most, least = (plan(recompute=choice).predicted.peak_bytes[0] for choice in ("none", "all"))
    assert least < most
    made = plan((most + least) // 2)
    assert any(isinstance(choice, tuple) for choice in made.memory_policy.recompute.values())
    assert made.predicted.peak_bytes[0] <= (most + least) // 2
    assert_same_numbers(compared(made, tmp_path))


def placed_on_two_tensor_ranks(graph: ModelGraph, batch: int) -> list[tuple[Placed, SegmentCost]]:
    """Of every placement on the frontier, all segments."""
    sharder, seen = Sharder(graph, CostModel(parse_hardware("2xA100-80GB"))), []

    def noted(placed: Placed) -> SegmentCost:
        seen.append((placed, evaluate(placed)))
        return seen[-1][1]

    with mock.patch.object(sharder_module, "evaluate", noted):
        sharder.frontier(MeshShape.of({"tp": 2}), batch)
    return seen


@pytest.mark.parametrize("batch", [1, 4])
def test_a_program_keeps_no_more_than_its_point_counts(batch: int) -> None:
    """A batch of one too, whose gathered results are views of what was gathered."""
    compared = 0
    for placed, cost in placed_on_two_tensor_ranks(graph_of("tiny-llama", batch), batch):
        axes = tuple(MeshAxis(axis.name, axis.size, 0, axis.name) for axis in placed.mesh.axes)
        context = ShardContext(axes, placed.solutions, torch.device("cpu"))

        def kept_bytes(recompute: bool | tuple[str, ...]) -> int:
            """Without parameters that were gathered for the forward."""
            program = build_segment_program(placed.segment, context, recompute)  # noqa: B023
            results = program.forward.graph.output_node().args[0]
            kept = results[len(results) - program.num_saved :]  # type: ignore[arg-type, index]
            own = [node for node in kept if not str(node.meta.get("of")).startswith("param_")]
            return sum(node.meta["val"].untyped_storage().nbytes() for node in own)

        partial = [point for point in cost.recompute_points if not point.is_whole]
        most = kept_bytes(False) if partial else 0
        for point in partial:
            kept = kept_bytes(point.recomputed)
            assert kept <= 1.02 * point.saved_bytes, (placed.segment.name, point)
            assert kept < most
            compared += 1
    assert compared >= 8
