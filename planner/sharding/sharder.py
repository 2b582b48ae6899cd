"""The Sharder: solves the placements of a captured model for a (data, tensor) mesh, one axis after the other.

The data axis comes first. Its problem has the batch split as given and parameters whole; solved on the captured batch
(a number that divides no other dimension, so that a dimension that carries the batch can be told by its size), it holds
for every data-parallel degree and microbatch size. The tensor axis is then solved on what one data rank holds. Given
the data axis, each answer is optimal with a proven bound; the two are not solved jointly.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import fx

from ...costmodel.model import CostModel
from ...profiler.graph import ModelGraph, Segment
from ...profiler.normalize import source_of
from ...profiler.work import OpWork, op_work, size_bytes
from ..interfaces import ShardingSolution
from ..plan import ConservativeOp
from ..solver import Solution
from .evaluate import AxisView, Move, evaluate
from .pbqp import solve
from .placement import R
from .problem import TIE_BREAK_S_PER_BYTE, Axis, Build, build
from .solution import AxisSolution, read_choice, whole, write_placements
from .strategy import Strategy, is_op, view_of

PLACEMENT_AXES = ["dp", "tp"]
MIN_SPLIT_SHARE = 0.1  # of the parameters: a tensor axis that splits less is of no use as it is
MEMORY_FIRST_S_PER_BYTE = (1e-3, 1e-6)  # of parameters, far above what any collective costs; of results


def carries_batch(tensor: torch.Tensor, batch: int) -> bool:
    return any(size % batch == 0 and size > 0 for size in tensor.shape)


@dataclass
class _AxisResult:
    solution: AxisSolution
    made: Build
    proof: Solution


class Sharder:
    """Caches by (tp, local batch); the data axis is solved once."""

    def __init__(self, graph: ModelGraph, cost_model: CostModel, pinned: dict[str, int] | None = None) -> None:
        self.graph, self.cost_model, self.pinned = graph, cost_model, pinned or {}
        self.batch = max(graph.batch_size, 1)
        self.counts: dict[str, int] = defaultdict(int)
        for instance in graph.instances:
            self.counts[instance.segment] += 1
        self._work: dict[int, OpWork] = {}
        self._data: _AxisResult | None = None
        self._tensor: dict[tuple[int, int], _AxisResult] = {}
        self._solutions: dict[tuple[int, int, int], ShardingSolution] = {}
        self.moves: dict[tuple[int, int, int], dict[str, list[Move]]] = {}

    # ------------------------------------------------------------------ public

    def solve(self, *, dp: int, tp: int, local_batch: int) -> ShardingSolution | None:
        key = (dp, tp, local_batch)
        if key not in self._solutions:
            self._solutions[key] = self._solve(dp, tp, local_batch)
        return self._solutions[key]

    # ------------------------------------------------------------------ sizes of the run

    def work(self, node: fx.Node) -> OpWork:
        if id(node) not in self._work:
            self._work[id(node)] = op_work(node)
        return self._work[id(node)]

    def data_bytes(self, segment: str, node: fx.Node, output: int, dp: int, local_batch: int) -> float:
        """Bytes of a result on one data rank, whole on the tensor axis."""
        val = node.meta["val"]
        tensor = val[output] if isinstance(val, (tuple, list)) else val
        if not isinstance(tensor, torch.Tensor):
            return 0.0
        place = self.data.solution.of_result(segment, node, output)
        full = size_bytes(tensor)
        if place >= 0:
            return full / self.batch * local_batch
        return full / self.batch * local_batch * dp if carries_batch(tensor, self.batch) else float(full)

    def data_share(self, segment: str, node: fx.Node, dp: int, local_batch: int) -> float:
        """Share of the captured op's work that one data rank does."""
        strategy = self.data.solution.strategies[(segment, node.name)]
        if any(p >= 0 for p in (*strategy.inputs, *strategy.outputs)):
            return local_batch / self.batch
        view = view_of(node)
        tensors = [*view.inputs, *(o for o in view.outputs if o is not None)]
        return local_batch * dp / self.batch if any(carries_batch(t, self.batch) for t in tensors) else 1.0

    def op_seconds(self, node: fx.Node, share: float, moved: float) -> float:
        work = self.work(node)
        if work.bytes_moved == 0:  # a view
            return 0.0
        return self.cost_model.op_seconds(str(node.target), work.flops * share, moved, _dtype(node))

    def _collectives(self, axis: str, size: int):
        total = self.cost_model.cluster.num_devices
        mesh = (
            {"pp": 1, "dp": max(total // size, 1), "tp": size}
            if axis == "tp"
            else {"pp": 1, "dp": max(total, 2), "tp": 1}
        )
        if mesh["dp"] * mesh["tp"] > total:
            mesh = {"pp": 1, "dp": 1, "tp": total}
        group = self.cost_model.cluster.axis_links(mesh, axis)
        return lambda kind, num_bytes: self.cost_model.collective_seconds(kind, num_bytes, group)

    def _memory_s(self, num_bytes: float) -> float:
        return (
            self.cost_model.op_seconds("aten.clone.default", 0.0, 2.0 * num_bytes, torch.float32) if num_bytes else 0.0
        )

    # ------------------------------------------------------------------ the two axes

    @property
    def data(self) -> _AxisResult:
        if self._data is None:
            self._data = self._solve_data()
        return self._data

    def _solve_data(self) -> _AxisResult:
        batch = self.batch
        if batch == 1:  # captured for one data rank that holds one sample: nothing to split
            return _AxisResult(whole(self.graph), Build(), Solution("optimal", 0.0, 0.0, 0.0, 0.0))
        axis = Axis(
            name="dp",
            size=batch,
            collective_s=self._collectives("dp", batch),
            memory_s=self._memory_s,
            op_s=self.op_seconds,
            local_bytes=lambda segment, node, output: _captured_bytes(node, output),
            allowed=lambda segment, node, output, tensor, dim: tensor.shape[dim] % batch == 0,
            key_allowed=lambda segment, key, dim: True,
            inner_allowed=lambda segment, node, strategy: True,
            input_place=lambda name, shape: 0 if len(shape) and shape[0] == batch else R,
            params_whole=True,
        )
        return self._run(axis, {})

    def _solve_tensor(self, dp: int, tp: int, local_batch: int) -> _AxisResult:
        """Fastest; where that splits hardly anything, as on models too small to be worth the traffic, smallest."""
        found = self._solve_tensor_weighted(dp, tp, local_batch, (TIE_BREAK_S_PER_BYTE, TIE_BREAK_S_PER_BYTE))
        if self._split_share(found.solution, tp) < MIN_SPLIT_SHARE:
            found = self._solve_tensor_weighted(dp, tp, local_batch, MEMORY_FIRST_S_PER_BYTE)
        return found

    def _split_share(self, solution: AxisSolution, tp: int) -> float:
        """Share of the parameters' elements that the axis splits."""
        split = total = 0
        for name, segment in self.graph.segments.items():
            for slot, shape in enumerate(segment.param_shapes):
                elements = torch.Size(shape).numel() * self.counts[name]
                total += elements
                split += elements if solution.places.get((name, f"param_{slot}"), R) >= 0 else 0
        return split / total if total else 1.0

    def _solve_tensor_weighted(self, dp: int, tp: int, local_batch: int, byte_s: tuple[float, float]) -> _AxisResult:
        data = self.data.solution
        axis = Axis(
            name="tp",
            size=tp,
            collective_s=self._collectives("tp", tp),
            memory_s=self._memory_s,
            op_s=lambda node, share, moved: self.op_seconds(node, share * self._share_of[id(node)], moved),
            local_bytes=lambda segment, node, output: self.data_bytes(segment, node, output, dp, local_batch),
            allowed=lambda segment, node, output, tensor, dim: data.of_result(segment, node, output) != dim,
            key_allowed=lambda segment, key, dim: data.places.get((segment, key)) != dim,
            inner_allowed=lambda segment, node, strategy: _compatible(data.strategies[(segment, node.name)], strategy),
            input_place=lambda name, shape: R,
            params_whole=False,
            param_byte_s=byte_s[0],
            result_byte_s=byte_s[1],
        )
        self._share_of = {
            id(node): self.data_share(name, node, dp, local_batch)
            for name, segment in self.graph.segments.items()
            for node in segment.joint.graph.nodes
            if is_op(node)
        }
        return self._run(axis, self.pinned)

    def _run(self, axis: Axis, pinned: dict[str, int]) -> _AxisResult:
        made = build(self.graph, axis, pinned)
        choice, proof = solve(made.problem)
        assert proof.status in ("optimal", "feasible"), f"{axis.name}: {proof.status}"  # all whole is always possible
        return _AxisResult(read_choice(self.graph, made, choice, axis.params_whole), made, proof)

    # ------------------------------------------------------------------ figures

    def _solve(self, dp: int, tp: int, local_batch: int) -> ShardingSolution:
        started = time.perf_counter()
        data = self.data
        if tp > 1:
            known = self._tensor.get((tp, local_batch))
            tensor = known or self._solve_tensor(dp, tp, local_batch)
            self._tensor[(tp, local_batch)] = tensor
            solution, proof = tensor.solution, tensor.proof
        else:
            solution, proof = whole(self.graph), data.proof
        axes = [
            AxisView("dp", dp, data.solution, self._collectives("dp", dp)),
            AxisView("tp", tp, solution, self._collectives("tp", tp)),
        ]
        costs, listed = {}, {}
        for name, segment in self.graph.segments.items():
            costs[name], listed[name] = self._evaluate(segment, axes, dp, tp, local_batch)
        self.moves[(dp, tp, local_batch)] = listed
        objective = sum(
            self.counts[n] * (c.forward_s + c.backward_s + c.forward_comm_s + c.backward_comm_s)
            for n, c in costs.items()
        )
        return ShardingSolution(
            costs=costs,
            placements=write_placements(self.graph, [data.solution, solution]),
            boundary_bytes=self._boundary_bytes(solution, dp, tp, local_batch),
            objective_s=objective,
            lower_bound_s=objective * (1 - proof.gap_fraction),
            gap_fraction=proof.gap_fraction,
            seconds=time.perf_counter() - started,
            status=proof.status,
            conservative=self._conservative(dp, tp, local_batch),
        )

    def _local_bytes(
        self, solution: AxisSolution, segment: str, node: fx.Node, output: int, dp: int, tp: int, batch: int
    ) -> float:
        full = self.data_bytes(segment, node, output, dp, batch)
        return full / tp if tp > 1 and solution.of_result(segment, node, output) >= 0 else full

    def _evaluate(self, segment: Segment, axes: list[AxisView], dp: int, tp: int, local_batch: int):
        name, solution, data = segment.name, axes[1].solution, self.data.solution

        def bytes_before(node: fx.Node, output: int, axis: int) -> float:
            if axis == 1:
                return self.data_bytes(name, node, output, dp, local_batch)
            full = self._local_bytes(solution, name, node, output, dp, tp, local_batch)
            return full * dp if data.of_result(name, node, output) >= 0 else full

        def share(node: fx.Node) -> float:
            strategy = solution.strategies[(name, node.name)]
            split = any(p >= 0 for p in (*strategy.inputs, *strategy.outputs)) or bool(strategy.lowering)
            return self.data_share(name, node, dp, local_batch) / (tp if split else 1)

        return evaluate(
            segment,
            axes,
            bytes_before,
            lambda node, k: self._local_bytes(solution, name, node, k, dp, tp, local_batch),
            self.op_seconds,
            share,
        )

    def _boundary_bytes(self, solution: AxisSolution, dp: int, tp: int, local_batch: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for instance in self.graph.instances:
            segment = self.graph.segments[instance.segment]
            for names, infos, key in (
                (instance.inputs, segment.inputs, "input"),
                (instance.outputs, segment.outputs, "output"),
            ):
                for slot, (name, info) in enumerate(zip(names, infos, strict=True)):
                    full = float(torch.Size(info.shape).numel() * info.dtype.itemsize)
                    batched = any(s % self.batch == 0 and s > 0 for s in info.shape)
                    split = self.data.solution.places.get((segment.name, f"{key}_{slot}"), R) >= 0
                    if batched:
                        full = full / self.batch * local_batch * (1 if split else dp)
                    if tp > 1 and solution.places.get((segment.name, f"{key}_{slot}"), R) >= 0:
                        full /= tp
                    found[name] = int(full)
        return found

    def _conservative(self, dp: int, tp: int, local_batch: int) -> list[ConservativeOp]:
        rows = []
        for segment, node in self.data.made.unknown:
            share = self.data_share(segment, node, dp, local_batch)
            moved = sum(
                self.data_bytes(segment, *pair, dp, local_batch)
                for pair in [(node, k) for k in range(len(view_of(node).outputs))]
            )
            cost = self.op_seconds(node, share, moved) * self.counts[segment]
            rows.append(
                ConservativeOp(op=str(node.target), node=f"{segment}.{node.name}", source=source_of(node), cost_s=cost)
            )
        return rows


def _captured_bytes(node: fx.Node, output: int) -> float:
    val = node.meta["val"]
    tensor = val[output] if isinstance(val, (tuple, list)) else val
    return float(size_bytes(tensor)) if isinstance(tensor, torch.Tensor) else 0.0


def _dtype(node: fx.Node) -> torch.dtype:
    for tensor in view_of(node).inputs:
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def _compatible(first: Strategy, second: Strategy) -> bool:
    """No tensor split twice on one dimension, and at most one of the two replaces the op's program."""
    if first.lowering and second.lowering and {first.lowering, second.lowering} != {"nll_rows", "nll_cols"}:
        return False
    pairs = [*zip(first.inputs, second.inputs, strict=True), *zip(first.outputs, second.outputs, strict=True)]
    return all(a != b or a < 0 for a, b in pairs)
