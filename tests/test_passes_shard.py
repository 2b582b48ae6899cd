"""Segments rewritten for any valid placements compute, over all ranks, what the captured graph computes.

Placements are random, on meshes of one and two axes, even and uneven: the sharding pass must be right for whatever a
plan asks, not only for what a solver finds good. Forward and backward are the partitioned graphs that the runtime runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured import PRESETS, Recorded, recorded
from matrix import cells
from one_op import assert_same
from random_placements import random_solutions
from simulated_ranks import cut, join, mesh, run

from shardwright.ops.placement import R
from shardwright.passes.build import build_segment_program
from shardwright.passes.program import SegmentProgram
from shardwright.passes.shard import ShardContext
from shardwright.plans.placements import AxisSolution
from shardwright.profiler._torch import lazy_recompile

MESHES = ({"dp": 2, "tp": 2}, {"dp": 1, "tp": 3}, {"dp": 3, "tp": 2})


def run_program(
    one: Recorded, solutions: tuple[AxisSolution, ...], sizes: dict[str, int], recompute: bool
) -> tuple[dict[str, Any], list[SegmentProgram]]:
    """Results by key, whole, of forward and backward on imaginary ranks."""
    ranks, name = mesh(sizes), one.segment.name

    def places(key: str) -> list[int]:
        return [s.places.get((name, key), R) for s in solutions]

    with lazy_recompile():
        programs = [
            build_segment_program(one.segment, ShardContext(axes, solutions, torch.device("cpu")), recompute)
            for axes in ranks
        ]
    given: list[dict[str, Any]] = [
        {node.name: cut(value, places(node.name), axes) for node, value in one.placeholders.items()} for axes in ranks
    ]
    fixed = [n for n in given[0] if n.startswith(("param_", "buffer_"))]
    inputs = [n for n in given[0] if n.startswith("input_")]
    forward = run(
        [p.forward for p in programs], [[g[n] for n in [*fixed, *inputs, "key"]] for g in given], ranks
    )  # fmt: skip
    keys = one.segment.signature.results
    split = programs[0].num_outputs + len(programs[0].mutated_buffers)
    local = [dict(zip(keys, results[:split], strict=False)) for results in forward]
    if programs[0].backward is not None:
        tangents = [n for n in given[0] if n.startswith("tangent_")]
        arguments = [
            [*(g[n] for n in [*fixed, "key"]), *results[split:], *(g[n] for n in tangents)]
            for g, results in zip(given, forward, strict=True)
        ]
        backward = run([p.backward for p in programs], arguments, ranks)
        for found, results in zip(local, backward, strict=True):
            found |= dict(zip(keys[split:], results, strict=True))
    whole = {
        key: join([found[key] for found in local], places(key), ranks) for key in local[0] if local[0][key] is not None
    }
    _check_shapes(programs, given, local)
    return whole, programs


def _check_shapes(programs: list[SegmentProgram], given: list[dict[str, Any]], local: list[dict[str, Any]]) -> None:
    """What the runtime allocates receive buffers by."""
    for program, placed, found in zip(programs, given, local, strict=True):
        for kind, metas, tensors in (
            ("input", program.input_meta, placed), ("output", program.output_meta, found),
            ("tangent", program.tangent_meta, placed),
        ):  # fmt: skip
            for i, (shape, dtype) in enumerate(metas):
                assert (tuple(tensors[f"{kind}_{i}"].shape), tensors[f"{kind}_{i}"].dtype) == (shape, dtype)


def compare(one: Recorded, found: dict[str, Any]) -> None:
    expected = dict(zip(one.segment.signature.results, one.results, strict=True))
    assert set(found) == {key for key, value in expected.items() if value is not None}
    for key, value in found.items():
        try:
            assert_same(value, expected[key])
        except AssertionError as error:
            raise AssertionError(f"{one.segment.name} {key}: {error}") from None


@pytest.mark.parametrize("preset", cells(PRESETS, ["tiny-gpt2", "tiny-llama", "mlp", "tiny-unet", "tiny-mixtral"]))
def test_any_placements_give_the_same_numbers(preset: str) -> None:
    for i, one in enumerate(recorded(preset)):
        sizes = MESHES[i % len(MESHES)]
        found, programs = run_program(one, random_solutions(one.segment, sizes, i), sizes, recompute=i % 2 == 0)
        compare(one, found)
        assert all(p.num_saved == programs[0].num_saved for p in programs)
