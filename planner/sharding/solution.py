"""From the solver's option numbers to what each mesh axis does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ...ops.placement import P, Places, R
from ...plans.placements import AxisSolution
from ...profiler.graph import ModelGraph, Segment
from ...profiler.joint import flatten_outputs
from ...profiler.op_view import origin
from ...profiler.slots import PARAM, PARAM_GRAD, slot_name
from .variables import COPY, Build, slot_key


def read_choice(graph: ModelGraph, made: Build, choice: list[int], data_axes: Sequence[bool]) -> list[AxisSolution]:
    """From the solver's option numbers to placements on each axis.

    data_axes: on those every gradient of a parameter leaves its segment as a partial sum, which the runtime reduces as
    the ZeRO level asks; one that is already whole is kept by the first rank alone.
    """
    solutions = [AxisSolution() for _ in data_axes]

    def put(segment: str, key: str, places: Places) -> None:
        for solution, place in zip(solutions, places, strict=True):
            solution.places[(segment, key)] = place

    for (owner, node), index in made.op_vars.items():
        for solution, strategy in zip(solutions, made.op_options[index][choice[index]], strict=True):
            solution.strategies[(owner, node)] = strategy
    for (owner, node, output, phase), index in made.copy_vars.items():
        put(owner, f"{node}.{output}>{phase}", made.place_options[index][choice[index]])
    for (owner, node, output), index in made.kept_vars.items():
        kind, places = made.kept_options[index][choice[index]]
        if kind == COPY:
            put(owner, f"{node}.{output}>kept", places)
    for (owner, kind, slot), index in made.slot_vars.items():
        put(owner, slot_key(graph.segments[owner], kind, slot), made.place_options[index][choice[index]])
    for segment in graph.segments.values():
        for solution, data in zip(solutions, data_axes, strict=True):
            _param_gradients(segment, solution, data)
    return solutions


def _param_gradients(segment: Segment, solution: AxisSolution, data: bool) -> None:
    results = flatten_outputs(segment.joint.graph)
    first = len(segment.outputs) + len(segment.mutated_buffers)
    for slot in range(len(segment.param_shapes)):
        node = results[first + slot]
        if isinstance(node, fx.Node):
            param = solution.places[(segment.name, slot_name(PARAM, slot))]
            found = solution.of_result(segment.name, *origin(node))
            place = P if param == R and (data or found == P) else param
            solution.places[(segment.name, slot_name(PARAM_GRAD, slot))] = place
