"""What a plan decided for each op, and what that costs: the cost model's own figures, taken apart again.

Every figure is of one rank, one instance of a segment and one microbatch. A collective stands with the op or tensor
whose result it moves. Backward ops bear no name of their own: they stand with the module whose values they read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from ...plans.document import Plan
from ...plans.placements import read_placements
from ...profiler.graph import ModelGraph, Segment
from ...profiler.nodes import source_of
from ...profiler.op_view import storage_root
from ...profiler.slots import BUFFER, INPUT, KEY, PARAM, TANGENT, index_of, kind_of, slot_name
from ..sharding.cost import op_load, partial_axes
from ..sharding.mesh import Mesh
from ..sharding.pins import module_paths
from ..sharding.routes import Move, Placed, moves
from ..sharding.sharder import Sharder
from ..sharding.training import Sums


@dataclass(frozen=True)
class Collective:
    """full_bytes: of the tensor whole on this axis, as the other axes have it."""

    axis: str
    kind: str
    full_bytes: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Row:
    """An op, or a tensor that comes from outside (a parameter, a buffer, an input: `op` then says which).

    placements: by mesh axis; of an op "operands -> results". local_bytes: of the results on one rank. sums: of a
    parameter, the collectives that its gradient takes once a step, outside `seconds`; they pass beside the last
    backward where there is room.
    """

    segment: str
    node: str
    op: str
    phase: str
    module: str
    source: str  # "file:line"
    placements: dict[str, str]
    compute_s: float
    local_bytes: float
    collectives: tuple[Collective, ...]
    sums: tuple[Collective, ...] = ()

    @property
    def comm_s(self) -> float:
        return sum(c.seconds for c in self.collectives)

    @property
    def seconds(self) -> float:
        return self.compute_s + self.comm_s


@dataclass(frozen=True)
class Explanation:
    """rows: in program order. instances: of each distinct segment, the module paths it stands for."""

    rows: tuple[Row, ...]
    instances: dict[str, tuple[str, ...]]

    def matching(self, segment: str | None = None, pattern: str | None = None) -> tuple[Row, ...]:
        """pattern: a shell pattern over modules, ops and the names of nodes; leading parts of a module may be left
        out, and a module stands for all within it."""
        return tuple(
            row
            for row in self.rows
            if (segment is None or row.segment == segment) and (pattern is None or self._matches(row, pattern))
        )

    def _matches(self, row: Row, pattern: str) -> bool:
        if any(fnmatchcase(name, pattern) for name in (row.node, row.op, row.op.split(".")[-2:][0])):
            return True
        own = self.instances[row.segment]
        paths = {row.module} | {row.module.replace(own[0], path, 1) for path in own if own[0]}
        return any(_covers(path, pattern) for path in paths)

    def totals(self) -> dict[str, dict[str, float]]:
        """Per segment, all its instances together: seconds of compute, and of collectives by axis and kind."""
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            count, sums = len(self.instances[row.segment]), found.setdefault(row.segment, defaultdict(float))
            sums["compute"] += count * row.compute_s
            for collective in row.collectives:
                sums[f"{collective.axis} {collective.kind}"] += count * collective.seconds
        return {name: dict(sums) for name, sums in found.items()}

    def sums(self) -> dict[str, dict[str, float]]:
        """The same of the collectives that gradients of parameters take once a step."""
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            for collective in row.sums:
                totals = found.setdefault(row.segment, defaultdict(float))
                totals[f"{collective.axis} {collective.kind}"] += len(self.instances[row.segment]) * collective.seconds
        return {name: dict(totals) for name, totals in found.items()}

    def heaviest(self, rows: Iterable[Row]) -> list[Row]:
        """Those that take any time, the longest first, all instances of their segment counted."""
        total = {row: row.seconds * len(self.instances[row.segment]) for row in rows}
        return sorted((row for row in total if total[row] > 0), key=lambda row: -total[row])

    def to_dict(self, rows: Iterable[Row]) -> dict[str, Any]:
        return {
            "instances": {name: list(paths) for name, paths in self.instances.items()},
            "totals_s": self.totals(),
            "sums_s": self.sums(),
            "ops": [{**asdict(row), "comm_s": row.comm_s} for row in rows],
        }


def _covers(path: str, pattern: str) -> bool:
    parts = path.split(".")
    return any(
        fnmatchcase(".".join(parts[start:end]), pattern)
        for start in range(len(parts))
        for end in range(start + 1, len(parts) + 1)
    )


def explain(plan: Plan, graph: ModelGraph, sharder: Sharder) -> Explanation:
    """graph: the model as it was planned. sharder: of the same graph, with the cost model of the plan's cluster."""
    solutions = tuple(read_placements(plan.placements, len(plan.placement_axes)))
    shape = plan.mesh.shape.of_stage
    mesh = sharder.mesh(shape, max(1, plan.microbatch.size // shape.batch_ranks))
    instances: dict[str, list[str]] = defaultdict(list)
    names: dict[str, dict[str, str]] = {}
    for instance in graph.instances:
        instances[instance.segment].append(instance.module_path)
        slots = {slot_name(PARAM, k): name for k, name in enumerate(instance.params)}
        slots |= {slot_name(BUFFER, k): name for k, name in enumerate(instance.buffers)}
        slots |= {slot_name(INPUT, k): name for k, name in enumerate(instance.inputs)}
        outputs = zip(instance.outputs, graph.segments[instance.segment].outputs, strict=True)
        differentiated = [name for name, info in outputs if info.requires_grad]
        slots |= {slot_name(TANGENT, k): f"gradient of {name}" for k, name in enumerate(differentiated)}
        names.setdefault(instance.segment, slots)
    rows: list[Row] = []
    for name, segment in graph.segments.items():
        rows += _segment_rows(Placed(segment, mesh, solutions), plan, names[name], sharder.sums(shape))
    return Explanation(tuple(rows), {name: tuple(paths) for name, paths in instances.items()})


def _segment_rows(placed: Placed, plan: Plan, names: dict[str, str], sums: Sums) -> list[Row]:
    segment, mesh = placed.segment, placed.mesh
    moved: dict[str, list[Collective]] = defaultdict(list)
    for move in moves(placed):
        moved[move.node].append(_collective(move, mesh))
    written = plan.placements[segment.name]
    modules, sources = _attribution(segment)
    rows = []
    for node in segment.joint.graph.nodes:
        texts = written.get(node.name)
        if texts is None or node.name == KEY:
            continue
        outside = node.op == "placeholder"
        rows.append(
            Row(
                segment=segment.name,
                node=names.get(node.name, node.name) if outside else node.name,
                op=kind_of(node.name) if outside else str(node.target),
                phase=node.meta.get("phase", "forward"),
                module=_owner(node.name, names) if outside else modules[node],
                source="" if outside else sources[node],
                placements={
                    axis: text.replace("->", " -> ") for axis, text in zip(plan.placement_axes, texts, strict=True)
                },
                compute_s=0.0 if outside else mesh.op_s(node, *op_load(placed, node)),
                local_bytes=_local_bytes(placed, node),
                collectives=tuple(moved.get(node.name, ())),
                sums=tuple(_sums(placed, plan, node, sums)) if outside and kind_of(node.name) == PARAM else (),
            )
        )
    return rows


def _sums(placed: Placed, plan: Plan, param: fx.Node, sums: Sums) -> Iterator[Collective]:
    """What the gradient of a parameter takes once a step: over the axes that ZeRO splits state over, and over
    others where the parameter is whole and its gradient a partial sum."""
    index = index_of(param.name)
    if not placed.segment.param_requires_grad[index]:
        return
    elements = placed.local_bytes(param, 0) / param.meta["val"].element_size()
    axes = placed.mesh.axes
    split = tuple(axis.size > 1 and axis.role.splits_state for axis in axes)
    others = partial_axes(placed, index)
    num_bytes = elements * sums.kinds.reduce

    def named(over: tuple[bool, ...]) -> str:
        return " x ".join(axis.name for axis, wide in zip(axes, over, strict=True) if wide)

    if plan.zero == 0 or not any(split):
        both = tuple(a or b for a, b in zip(split, others, strict=True))
        if any(both):
            yield Collective(named(both), "all_reduce", num_bytes, sums.seconds(both, elements))
        return
    yield Collective(named(split), "reduce_scatter", num_bytes, sums.seconds(split, elements) / 2)
    if any(others):
        parts = plan.zero_extents.get("optimizer", plan.mesh.shape.state_ranks)
        yield Collective(named(others), "all_reduce", num_bytes / parts, sums.seconds(others, elements / parts))


def _owner(placeholder: str, names: dict[str, str]) -> str:
    """The module that a parameter or buffer belongs to."""
    return names[placeholder].rpartition(".")[0] if kind_of(placeholder) in (PARAM, BUFFER) else ""


def _collective(move: Move, mesh: Mesh) -> Collective:
    axis = next(axis for axis in mesh.axes if axis.name == move.axis)
    return Collective(move.axis, move.kind, move.full_bytes, axis.collective_s(move.kind, move.full_bytes))


def _local_bytes(placed: Placed, node: fx.Node) -> float:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return sum(placed.local_bytes(node, k) for k, v in enumerate(values) if isinstance(v, torch.Tensor))


def _attribution(segment: Segment) -> tuple[dict[fx.Node, str], dict[fx.Node, str]]:
    """(module, source line) of each op. A backward op takes those of the forward op that reads the same weight, else
    that made what it reads, else of the backward op before it."""
    modules: dict[fx.Node, str] = {}
    sources: dict[fx.Node, str] = {}
    own: set[fx.Node] = set()
    for node in segment.joint.graph.nodes:
        if node.op != "call_function":
            continue
        paths = module_paths(node)
        modules[node], sources[node] = (paths[-1] if paths else ""), source_of(node)
        if sources[node]:
            own.add(node)
        elif node.meta.get("phase") == "backward":
            kin = [_reader(n) if n.op == "placeholder" else n for n in node.all_input_nodes]
            known = [n for n in kin if n is not None and sources.get(n)]
            best = min(known, key=lambda n: (not _is_weight(n), n not in own), default=None)
            if best is not None:
                modules[node], sources[node] = modules[best], sources[best]
    return modules, sources


def _reader(placeholder: fx.Node) -> fx.Node | None:
    """The forward op that reads a parameter."""
    return next((n for n in placeholder.users if n.meta.get("phase") == "forward"), None)


def _is_weight(node: fx.Node) -> bool:
    return any(kind_of(storage_root(n)[0].name) == PARAM for n in (node, *node.all_input_nodes))
