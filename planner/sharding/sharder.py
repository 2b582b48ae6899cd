"""The Sharder: solves the placements of a captured model for a (data, tensor) mesh, both axes at once.

Each (dp, tp, local batch) and each price of a byte is one problem (problem.py), solved exactly with a proven bound
(pbqp.py). A price of zero asks for the fastest placements; higher ones walk down the lower convex hull of (seconds,
bytes), one solve a point.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ...costmodel.model import CostModel
from ...errors import ExitCode, ShardwrightError
from ...profiler.graph import ModelGraph
from ...profiler.nodes import source_of
from ...profiler.work import OpWork, op_work
from ..interfaces import ShardingSolution
from ..plan import ConservativeOp
from ..solver import Solution
from .evaluate import Move, Placed, evaluate, matrix_flops, moves, op_load
from .mesh import TIE_BREAK_S_PER_BYTE, Axis, Mesh, Prices, Sizes, is_split
from .pbqp import solve
from .pins import Pins, cannot_meet
from .placement import Places, R, shares
from .problem import Build, Catalog, Demands, build
from .solution import AxisSolution, read_choice, write_placements
from .strategy import is_op, view_of

PLACEMENT_AXES = ["dp", "tp"]
# A tensor axis that splits less of the parameters, and less of the matrix products, is of no use as it is.
MIN_SPLIT_PARAMS, MIN_SPLIT_FLOPS = 0.1, 0.5
MAX_FRONTIER = 3
MAX_SOLVE_S = 120.0  # one integer program; elimination alone, which nearly every model takes, needs no limit
HIGHEST_PRICE = 1e-3  # of a byte kept, in seconds: above what any collective costs
HULL_TOLERANCE = 1e-2  # a point counts that lies below the line by this share of its height
MEMORY_FIRST = Prices(param=1e-3, result=1e-6)  # of parameters, far above what any collective costs


@dataclass
class _Solved:
    mesh: Mesh
    solutions: tuple[AxisSolution, ...]
    made: Build
    proof: Solution


class Sharder:
    """Caches by (dp, tp, local batch): the fastest placements, and the frontier where it was asked for."""

    def __init__(
        self,
        graph: ModelGraph,
        cost_model: CostModel,
        wishes: Mapping[str, int] | None = None,
        pins: Pins | None = None,
        time_limit_s: float | None = None,
    ) -> None:
        """wishes: name of a parameter -> how it lies over the tensor axis where sizes allow it. pins: what must be.
        time_limit_s: of each integer program; it then gives its best answer and the gap that it proved.
        """
        self.time_limit_s = min(time_limit_s or MAX_SOLVE_S, MAX_SOLVE_S)
        self.graph, self.cost_model = graph, cost_model
        self.wishes = {name: (R, place) for name, place in (wishes or {}).items()}
        self.pins = pins or Pins()
        self._pinned = self.pins.resolve(graph, PLACEMENT_AXES)
        self.batch = max(graph.batch_size, 1)
        self.counts: dict[str, int] = defaultdict(int)
        for instance in graph.instances:
            self.counts[instance.segment] += 1
        self._work: dict[int, OpWork] = {}
        self._dtypes: dict[int, torch.dtype] = {}
        self._catalog = Catalog()
        self._solutions: dict[tuple[int, int, int], ShardingSolution] = {}
        self._problems: dict[tuple[int, int, int], tuple[Mesh, Build]] = {}  # the latest
        self._frontiers: dict[tuple[int, int, int], list[ShardingSolution]] = {}
        self.moves: dict[tuple[int, int, int], dict[str, list[Move]]] = {}

    # ------------------------------------------------------------------ public

    def solve(self, *, dp: int, tp: int, local_batch: int) -> ShardingSolution:
        """Raises ShardwrightError, exit code 4, where a pin cannot be met on this mesh."""
        key = (dp, tp, local_batch)
        if key not in self._solutions:
            self._solutions[key] = self._solve(dp, tp, local_batch)
        return self._solutions[key]

    def frontier(self, *, dp: int, tp: int, local_batch: int) -> list[ShardingSolution]:
        """Points of the lower convex hull of (seconds, bytes kept for the backward), fastest first. Each is the optimum
        at some price of a byte; between two of them the price that makes both equal finds the next, if there is one.
        """
        key = (dp, tp, local_batch)
        if key not in self._frontiers:
            fastest = self.solve(dp=dp, tp=tp, local_batch=local_batch)
            smallest = self._at_price(key, HIGHEST_PRICE)
            points = [fastest, smallest]
            for _ in range(MAX_FRONTIER - 2):
                found = self._between(key, points)
                if found is None:
                    break
                points = sorted([*points, found], key=lambda point: point.objective_s)
            self._frontiers[key] = [
                p for i, p in enumerate(points) if i == 0 or p.saved_bytes < points[i - 1].saved_bytes
            ]
        return self._frontiers[key]

    def _between(self, key: tuple[int, int, int], points: Sequence[ShardingSolution]) -> ShardingSolution | None:
        """A new point below the line between two neighbours, the pair that is furthest apart in bytes first."""
        pairs = sorted(itertools.pairwise(points), key=lambda pair: pair[1].saved_bytes - pair[0].saved_bytes)
        for fast, small in pairs:
            slower_s, fewer = small.objective_s - fast.objective_s, fast.saved_bytes - small.saved_bytes
            if slower_s <= 0 or fewer <= 0:
                continue
            found = self._at_price(key, slower_s / fewer)
            saves_s = (fast.saved_bytes - found.saved_bytes) * slower_s / fewer
            if found.objective_s - fast.objective_s < saves_s - HULL_TOLERANCE * slower_s:
                return found
        return None

    def _at_price(self, key: tuple[int, int, int], price: float) -> ShardingSolution:
        started = time.perf_counter()
        return self._figures(self._solved(*self._problem(key), price), started)

    # ------------------------------------------------------------------ costs

    def op_seconds(self, node: fx.Node, share: float, moved: float) -> float:
        key = id(node)
        if key not in self._work:
            self._work[key], self._dtypes[key] = op_work(node), _dtype(node)
        work = self._work[key]
        if work.bytes_moved == 0:  # a view
            return 0.0
        return self.cost_model.op_seconds(str(node.target), work.flops * share, moved, self._dtypes[key])

    def _memory_s(self, num_bytes: float) -> float:
        if not num_bytes:
            return 0.0
        return self.cost_model.op_seconds("aten.clone.default", 0.0, 2.0 * num_bytes, torch.float32)

    def mesh(self, dp: int, tp: int, local_batch: int, prices: Prices | None = None) -> Mesh:
        return Mesh(
            axes=(self._axis("dp", dp, dp, tp), self._axis("tp", tp, dp, tp)),
            batch=self.batch,
            run_batch=local_batch * dp,
            op_s=self.op_seconds,
            memory_s=self._memory_s,
            prices=prices or Prices(),
        )

    def _axis(self, name: str, size: int, dp: int, tp: int) -> Axis:
        cluster = self.cost_model.cluster
        if size == 1:
            return Axis(name, 1, lambda kind, num_bytes: 0.0, data=name == "dp")
        if dp * tp > cluster.num_devices:  # asked for more than there is: the same axis on all there is
            dp, tp = (cluster.num_devices, 1) if name == "dp" else (1, cluster.num_devices)
        links = cluster.axis_links({"pp": cluster.num_devices // (dp * tp), "dp": dp, "tp": tp}, name)

        def seconds(kind: str, num_bytes: float) -> float:
            held = num_bytes / size if kind == "all_to_all" else num_bytes  # what each rank has of the tensor
            return self.cost_model.collective_seconds(kind, held, links)

        return Axis(name, size, seconds, data=name == "dp")

    # ------------------------------------------------------------------ solving

    def _demands(self, dp: int) -> Demands:
        def inputs(name: str, sizes: Sizes) -> Places:
            dim = self.graph.batch_dims.get(name.removeprefix("input:"), R)
            return (dim if dp > 1 and dim != R and sizes.batched[dim] else R, R)

        return Demands(inputs, self.wishes, self._pinned)

    def _problem(self, key: tuple[int, int, int]) -> tuple[Mesh, Build]:
        if key not in self._problems:
            narrow = {name for name, size in zip(PLACEMENT_AXES, key, strict=False) if size == 1}
            if narrow & self.pins.split_axes:
                pin = next(pin for pin in self.pins.pins if pin.splits and pin.axis in narrow)
                raise cannot_meet(pin, f"{pin.axis}={dict(zip(PLACEMENT_AXES, key, strict=False))[pin.axis]}", "R")
            mesh = self.mesh(*key)
            self._problems = {key: (mesh, build(self.graph, mesh, self._demands(key[0]), self._catalog))}
        return self._problems[key]

    def _solved(self, mesh: Mesh, made: Build, price: float) -> _Solved:
        choice, proof = solve(made.problem, self.time_limit_s, price=price, prepared=made.prepared)
        if proof.status == "unknown":
            raise ShardwrightError(
                f"no placements of {self.graph.name} were found in {self.time_limit_s:g} s, for {len(choice)} choices",
                means="the integer program is larger than the time allows",
                change="--time-limit",
                works=f"--time-limit {4 * self.time_limit_s:g}",
                exit_code=ExitCode.TIME_LIMIT,
            )
        assert proof.status in ("optimal", "feasible"), proof.status  # all whole is always possible
        return _Solved(mesh, tuple(read_choice(self.graph, made, choice, [a.data for a in mesh.axes])), made, proof)

    def _solve(self, dp: int, tp: int, local_batch: int) -> ShardingSolution:
        """Fastest; where that splits hardly anything, as on models too small to be worth the traffic, smallest."""
        started = time.perf_counter()
        solved = self._solved(*self._problem((dp, tp, local_batch)), TIE_BREAK_S_PER_BYTE)
        if tp > 1 and not self._is_of_use(solved):
            mesh = self.mesh(dp, tp, local_batch, MEMORY_FIRST)
            made = build(self.graph, mesh, self._demands(dp), self._catalog)
            solved = self._solved(mesh, made, TIE_BREAK_S_PER_BYTE)
        found = self._figures(solved, started)
        self.moves[(dp, tp, local_batch)] = {
            name: moves(Placed(segment, solved.mesh, solved.solutions)) for name, segment in self.graph.segments.items()
        }
        return found

    def _figures(self, solved: _Solved, started: float) -> ShardingSolution:
        costs = {
            name: evaluate(Placed(segment, solved.mesh, solved.solutions))
            for name, segment in self.graph.segments.items()
        }
        objective = sum(
            self.counts[n] * (c.forward_s + c.backward_s + c.forward_comm_s + c.backward_comm_s)
            for n, c in costs.items()
        )
        return ShardingSolution(
            costs=costs,
            placements=write_placements(self.graph, solved.solutions),
            boundary_bytes=self._boundary_bytes(solved),
            objective_s=objective,
            lower_bound_s=objective * (1 - solved.proof.gap_fraction),
            gap_fraction=solved.proof.gap_fraction,
            seconds=time.perf_counter() - started,
            status=solved.proof.status,
            conservative=self._conservative(solved),
            saved_bytes=sum(self.counts[n] * c.saved_bytes for n, c in costs.items()),
        )

    def _is_of_use(self, solved: _Solved) -> bool:
        """Does the tensor axis split parameters, or work?"""
        solution, split, total = solved.solutions[1], 0, 0
        whole = done = 0.0
        for name, segment in self.graph.segments.items():
            for slot, shape in enumerate(segment.param_shapes):
                elements = torch.Size(shape).numel() * self.counts[name]
                total += elements
                split += elements if solution.places.get((name, f"param_{slot}"), R) >= 0 else 0
            placed = Placed(segment, solved.mesh, solved.solutions)
            for node in segment.joint.graph.nodes:
                if is_op(node) and (flops := matrix_flops(node)):
                    whole += flops * self.counts[name]
                    done += flops * self.counts[name] * is_split(placed.strategies(node)[1])
        return split >= MIN_SPLIT_PARAMS * total or done >= MIN_SPLIT_FLOPS * whole > 0

    # ------------------------------------------------------------------ figures

    def _boundary_bytes(self, solved: _Solved) -> dict[str, int]:
        found: dict[str, int] = {}
        for instance in self.graph.instances:
            segment = self.graph.segments[instance.segment]
            for names, infos, kind in (
                (instance.inputs, segment.inputs, "input"),
                (instance.outputs, segment.outputs, "output"),
            ):
                for slot, (name, info) in enumerate(zip(names, infos, strict=True)):
                    sizes = solved.mesh.measure(torch.Size(info.shape), info.dtype)
                    key = (segment.name, f"{kind}_{slot}")
                    places = tuple(s.places.get(key, R) for s in solved.solutions)
                    found[name] = int(sizes.num_bytes / shares(places, solved.mesh.counts))
        return found

    def _conservative(self, solved: _Solved) -> list[ConservativeOp]:
        rows = []
        for name, node in solved.made.unknown:
            placed = Placed(self.graph.segments[name], solved.mesh, solved.solutions)
            cost = self.op_seconds(node, *op_load(placed, node)) * self.counts[name]
            rows.append(
                ConservativeOp(op=str(node.target), node=f"{name}.{node.name}", source=source_of(node), cost_s=cost)
            )
        return rows


def _dtype(node: fx.Node) -> torch.dtype:
    for tensor in view_of(node).inputs:
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32
