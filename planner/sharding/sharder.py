"""The Sharder: solves the placements of a captured model on the mesh of one stage, all axes at once.

Each (mesh, local batch) and each choice of prices is one problem (problem.py), solved exactly with a proven bound
(pbqp.py). The fastest placements are those of no price on bytes, and of a price on the sums of gradients where the
step's last backward does not hide them. Prices on bytes walk down the lower convex hull of (seconds, bytes), one solve
a point: bytes kept for the backward, and of training state what ZeRO leaves of it.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from ...costmodel.attention import AttentionCall
from ...costmodel.losses import LossCall
from ...costmodel.model import CostModel
from ...costmodel.norms import rms_norm_scratch_bytes
from ...errors import ExitCode, ShardwrightError
from ...ops.expert_rules import is_expert_op
from ...ops.placement import Places, R, shares
from ...ops.strategy import Strategy
from ...plans.axes import AxisRole, MeshShape, placement_axes, role_of
from ...plans.document import ConservativeOp
from ...plans.placements import AxisSolution, write_placements
from ...profiler.device import GroupLink
from ...profiler.graph import ModelGraph, Segment
from ...profiler.nodes import named_arguments, source_of
from ...profiler.op_view import view_of
from ...profiler.slots import INPUT, OUTPUT, PARAM, slot_name
from ...profiler.work import OpWork, op_work
from ..interfaces import ShardingSolution
from ..solver import Solution
from .cost import evaluate, op_load
from .expert_costs import by_hosts, chunks_of_tokens, expert_results, expert_scratch, least_dispatch_s
from .mesh import TIE_BREAK_S_PER_BYTE, Axis, Mesh, Sizes, is_split
from .pins import Pins, cannot_meet
from .problem import Catalog, build
from .routes import Move, Placed, moves
from .segment_facts import SegmentFacts
from .solution import read_choice
from .solve.pbqp import solve
from .training import Job, Sums
from .variables import STATE, Build, Demands

# shardwright's own: a user's op may have any of these names in a namespace of its own
_NORMS = {f"shardwright.{name}" for name in ("rms_norm", "add_rms_norm", "add_rms_norm_backward")}

# A tensor axis that splits less of the parameters, and less of the matrix products, is of no use as it is.
MIN_SPLIT_PARAMS, MIN_SPLIT_FLOPS = 0.1, 0.5
MAX_FRONTIER = 3  # points between which the hull is looked for, the ends among them
LEAST_SOLVE_S = 0.1
MAX_SOLVE_S = 120.0  # one integer program; elimination alone, which nearly every model takes, needs no limit
HIGHEST_PRICE = 1e-3  # of a byte, in seconds: above what any collective costs
LEAST_PRICE = 1e-6  # of a byte of the kind that weighs less, where all are at their highest price
HULL_TOLERANCE = 1e-2  # a point counts that lies below the line by this share of its height
WORTH = 5e-3  # of a microbatch: what comes once a step is weighed where it takes more than this of it
NEAR_LEAST = 1.02  # of the least bytes that are possible: nothing leaner is looked for

Key = tuple[MeshShape, int]  # of one stage, local batch


@dataclass(frozen=True)
class Prices:
    """Seconds that a byte kept for the backward, a byte of training state and a second of the sums are worth."""

    saved: float = TIE_BREAK_S_PER_BYTE
    state: float = TIE_BREAK_S_PER_BYTE
    sums: float = 0.0

    @property
    def columns(self) -> tuple[float, float, float]:
        return self.saved, self.state, self.sums


LEAST_STATE = Prices(LEAST_PRICE, HIGHEST_PRICE)
STATE_FIRST = Prices(0.0, LEAST_PRICE)  # low enough for seconds to be seen beside it


@dataclass
class _Solved:
    mesh: Mesh
    solutions: tuple[AxisSolution, ...]
    made: Build
    proof: Solution


class Sharder:
    """Caches by (mesh, local batch): the fastest placements, and the frontier where it was asked for."""

    def __init__(
        self,
        graph: ModelGraph,
        cost_model: CostModel,
        wishes: Mapping[str, Places] | None = None,
        pins: Pins | None = None,
        time_limit_s: float | None = None,
        job: Job = Job(),  # noqa: B008
        axes: Sequence[str] | None = None,
    ) -> None:
        """wishes: name of a parameter -> how it lies where sizes allow it. pins: what must be. axes: that placements
        are stated on, those of each mesh where None.
        time_limit_s: from now; an integer program then gives its best answer and the gap that it proved. job: what
        weighs on placements besides the model.
        """
        self.job, self._axes = job, tuple(axes) if axes is not None else None
        self._deadline = float("inf") if time_limit_s is None else time.monotonic() + time_limit_s
        self.graph, self.cost_model = graph, cost_model
        self.wishes = dict(wishes or {})
        self.pins = pins or Pins()
        self._pinned = self.pins.resolve(graph, placement_axes())
        self._lengths = sequence_lengths(graph)
        self._experts = expert_results(graph)
        self.batch = max(graph.batch_size, 1)
        self.counts: dict[str, int] = defaultdict(int)
        for instance in graph.instances:
            self.counts[instance.segment] += 1
        self._work: dict[int, OpWork] = {}
        self._attention: dict[int, AttentionCall | None] = {}
        self._dtypes: dict[int, torch.dtype] = {}
        self._catalog = Catalog()
        self._facts = {name: SegmentFacts(segment) for name, segment in graph.segments.items()}
        self._solutions: dict[Key, ShardingSolution] = {}
        self._problems: dict[Key, tuple[Mesh, Build]] = {}  # the latest
        self._frontiers: dict[Key, list[ShardingSolution]] = {}
        self._leanest: dict[tuple[Key, float], ShardingSolution] = {}
        self._least_states: dict[Key, float] = {}
        self._sums: dict[MeshShape, Sums] = {}
        self._expert_chunks: dict[Key, int] = {}
        self._dispatches: dict[Key, tuple[float, float]] = {}
        self.moves: dict[Key, dict[str, list[Move]]] = {}

    # ------------------------------------------------------------------ public

    def solve(self, mesh: MeshShape, local_batch: int) -> ShardingSolution:
        """Raises ShardwrightError, exit code 4, where a pin cannot be met on this mesh."""
        key = (mesh.of_stage, local_batch)
        if key not in self._solutions:
            self._solutions[key] = self._solve(key)
        return self._solutions[key]

    def frontier(self, mesh: MeshShape, local_batch: int) -> list[ShardingSolution]:
        """Points of the lower convex hull of (seconds, bytes), fastest first. Each is the optimum at some price of a
        byte; between two of them the price that makes both equal finds the next, if there is one. Where the leanest of
        them still repeats training state, another point is that of least state."""
        key = (mesh.of_stage, local_batch)
        if key not in self._frontiers:
            share = self.job.state_left(mesh.state_ranks)
            points = [self.solve(mesh, local_batch)]
            if mesh.tensor_ranks * mesh.sequence_ranks == 1 or self.job.prefer != "time":  # there is nothing to choose
                self._frontiers[key] = points
                return points
            points.append(self._at_price(key, self._dear(share)))
            for _ in range(MAX_FRONTIER - 2):
                found = self._between(key, points, share)
                if found is None:
                    break
                points = sorted([*points, found], key=lambda point: point.objective_s)
            least_state = self._least_state(key)
            if min(point.state_bytes for point in points) > NEAR_LEAST * least_state:
                points.append(self._at_price(key, LEAST_STATE))
            points.sort(key=lambda point: point.objective_s)
            self._frontiers[key] = [p for i, p in enumerate(points) if not any(_beats(q, p) for q in points[:i])]
        return self._frontiers[key]

    def leanest(self, mesh: MeshShape, local_batch: int, *, state_share: float) -> ShardingSolution:
        """Of least bytes, where a byte of training state counts as state_share of one that is kept for the backward.
        One of the frontier where that is as lean, to NEAR_LEAST."""
        key = (mesh.of_stage, local_batch)
        points = self.frontier(mesh, local_batch)
        best = min(points, key=lambda point: point.weighed_bytes(state_share))
        known = self.job.state_left(mesh.state_ranks)
        if state_share >= known:  # what the hull's own weights leave, and of state at least the least
            least = min(point.weighed_bytes(known) for point in points)
            least += (state_share - known) * self._least_state(key)
            if best.weighed_bytes(state_share) <= NEAR_LEAST * least:
                return best
        if (key, state_share) not in self._leanest:
            self._leanest[key, state_share] = self._at_price(key, self._dear(state_share))
        found = self._leanest[key, state_share]
        return min(best, found, key=lambda point: point.weighed_bytes(state_share))

    def _dear(self, state_share: float) -> Prices:
        """The highest prices on bytes, in this proportion."""
        return Prices(HIGHEST_PRICE / max(1.0, state_share), HIGHEST_PRICE * min(1.0, state_share))

    def _least_state(self, key: Key) -> float:
        """Bytes of training state that every placement leaves on a rank, before ZeRO."""
        if key not in self._least_states:
            weights = self._problem(key)[1].problem.weights
            self._least_states[key] = sum(float(rows[:, STATE].min()) for rows in weights.values())
        return self._least_states[key]

    def _between(self, key: Key, points: Sequence[ShardingSolution], share: float) -> ShardingSolution | None:
        """A new point below the line between two neighbours, the pair that is furthest apart in bytes first."""

        def bytes_of(point: ShardingSolution) -> float:
            return point.weighed_bytes(share)

        pairs = sorted(itertools.pairwise(points), key=lambda pair: bytes_of(pair[1]) - bytes_of(pair[0]))
        for fast, small in pairs:
            slower_s, fewer = small.objective_s - fast.objective_s, bytes_of(fast) - bytes_of(small)
            if slower_s <= 0 or fewer <= 0:
                continue
            price = slower_s / fewer
            found = self._at_price(key, Prices(price, price * share))
            saves_s = (bytes_of(fast) - bytes_of(found)) * price
            if found.objective_s - fast.objective_s < saves_s - HULL_TOLERANCE * slower_s:
                return found
        return None

    def _at_price(self, key: Key, prices: Prices) -> ShardingSolution:
        started = time.perf_counter()
        once = self._once_a_step(key)
        prices = Prices(prices.saved, prices.state + once.state, once.sums)
        return self._figures(key, self._solved(*self._problem(key), prices), started)

    def _once_a_step(self, key: Key) -> Prices:
        """What is added to a microbatch for the sums of gradients, and for the update and the accumulation of what is
        trained, by its bytes of state."""
        mesh, local_batch = key
        count = self.job.num_microbatches(mesh.batch_ranks, local_batch)
        update_s = self.sums(mesh).update_s(count, self.job.zero) / count
        return Prices(state=TIE_BREAK_S_PER_BYTE + update_s / self.job.kinds.of_trained, sums=1.0 / count)

    # ------------------------------------------------------------------ costs

    def op_seconds(self, node: fx.Node, share: float, moved: float) -> float:
        key = id(node)
        if key not in self._work:
            self._work[key], self._dtypes[key] = op_work(node), _dtype(node)
        work = self._work[key]
        if work.bytes_moved == 0:  # a view
            return 0.0
        call = self._attention_call(node)
        seconds = self.cost_model.attention_seconds(call, share) if call is not None else None
        if seconds is not None:
            return seconds
        flops = work.flops * share * (self.cost_model.attention_work(call) if call is not None else 1.0)
        if not work.is_aligned:
            flops *= self.cost_model.misaligned_factor()
        name, dtype = str(node.target), self._dtypes[key]
        seconds = self.cost_model.op_seconds(name, flops, moved, dtype, launches=work.launches)
        if call is not None:
            seconds += self.cost_model.attention_copies_seconds(call, share)
        loss = LossCall.read(node)
        if loss is not None:
            seconds += self.cost_model.op_seconds("aten._log_softmax", 0.0, loss.traffic_bytes(share), dtype)
        return seconds

    def _attention_call(self, node: fx.Node) -> AttentionCall | None:
        if id(node) not in self._attention:
            self._attention[id(node)] = AttentionCall.read(node)
        return self._attention[id(node)]

    def _scratch_bytes(self, node: fx.Node, share: float, bytes_of: Callable[[fx.Node], float]) -> tuple[float, float]:
        if is_expert_op(node):
            return expert_scratch(node, share), 0.0
        call = self._attention_call(node)
        loss = LossCall.read(node)
        if loss is not None:
            kind = self.cost_model.cluster.worst_device().kind
            return loss.scratch(bytes_of(loss.hidden), bytes_of(loss.weight), kind), 0.0
        if call is None:
            return self._norm_scratch(node, bytes_of), 0.0
        mask_bytes = bytes_of(call.mask_node) if call.mask_node is not None else 0.0
        return self.cost_model.attention_scratch_bytes(call, share, mask_bytes)

    def _norm_scratch(self, node: fx.Node, bytes_of: Callable[[fx.Node], float]) -> float:
        """Of an RMSNorm that plain PyTorch computes."""
        is_norm = str(node.target).removesuffix(".default") in _NORMS
        if not is_norm or self.cost_model.cluster.is_accelerated:
            return 0.0
        given = named_arguments(node)
        source = given["sum"] if "grad_y" in given else given["x"]
        size = source.meta["val"].element_size()
        return rms_norm_scratch_bytes(
            bytes_of(source) / size, size, cast_first=bool(given["cast_first"]), is_backward="grad_y" in given
        )

    def _memory_s(self, num_bytes: float) -> float:
        if not num_bytes:
            return 0.0
        return self.cost_model.op_seconds("aten.clone.default", 0.0, 2.0 * num_bytes, torch.float32)

    def sums(self, shape: MeshShape) -> Sums:
        """shape: of one stage."""
        if shape not in self._sums:
            self._sums[shape] = Sums(self.graph, self.cost_model, self.job.kinds, shape)
        return self._sums[shape]

    def mesh(self, shape: MeshShape, local_batch: int) -> Mesh:
        shape = shape.of_stage
        mesh = self._mesh(shape, local_batch)
        if shape.expert_ranks == 1 or self.job.experts == "gather":
            return mesh
        key = shape, local_batch
        if key not in self._expert_chunks:
            self._expert_chunks[key] = chunks_of_tokens(mesh, self._expert_ops())
        return replace(mesh, expert_chunks=self._expert_chunks[key])

    def _expert_ops(self) -> Iterator[tuple[fx.Node, Sequence[Strategy], int]]:
        """With their strategies, and how often each runs."""
        for name, segment in self.graph.segments.items():
            for node in filter(is_expert_op, segment.joint.graph.nodes):
                yield node, self._catalog.of(node)[1], self.counts[name]

    def _mesh(self, shape: MeshShape, local_batch: int) -> Mesh:
        return Mesh(
            axes=tuple(self._axis(role_of(name), shape) for name in self._axes or placement_axes(shape)),
            batch=self.batch,
            run_batch=local_batch * shape.batch_ranks,
            op_s=self.op_seconds,
            memory_s=self._memory_s,
            scratch_of=self._scratch_bytes,
            state_of=self.job.state_of,
            sum_all_s=self.sums(shape).seconds if shape.tensor_ranks > 1 else None,
            attention=self.job.attention,
            experts=self.job.experts,
            imbalance=self.job.imbalance(shape.expert_ranks, self.cost_model.table.get("expert_imbalance")),
            expert_results=self._experts if shape.expert_ranks > 1 else frozenset(),
            dispatch_s=self.cost_model.stack.figures.dispatch_s,
            on_cpu=not self.cost_model.cluster.is_accelerated,
            lengths=self._lengths if shape.sequence_ranks > 1 else frozenset(),
            weighs_vectors=self.job.prefer != "state",
            kept_whole=None if self.job.sequence_parallel else self._lengths,
        )

    def _axis(self, role: AxisRole, shape: MeshShape) -> Axis:
        cluster, size = self.cost_model.cluster, shape.size(role.name)
        if size == 1:
            return Axis(role.name, 1, lambda kind, num_bytes: 0.0, role)
        factors = shape.within(cluster.num_devices, role.name).factors
        links = cluster.axis_links(factors, role.name)
        per_host = by_hosts(self.graph, links) if role.cuts_experts else 1
        hops = self._hops(role, factors, per_host) if per_host > 1 else ()
        return Axis(role.name, size, self._collective_s(role, size, links), role, hops)

    def _collective_s(self, role: AxisRole, size: int, links: GroupLink) -> Callable[[str, float], float]:
        def seconds(kind: str, num_bytes: float) -> float:
            held = num_bytes / size if kind == "all_to_all" else num_bytes  # what each rank has of the tensor
            cost = self.cost_model
            timed = cost.collective_seconds if role.carries_batch else cost.tensor_collective_seconds
            by_links = timed(kind, held, links)
            return by_links if role.cost is None else role.cost(kind, num_bytes, by_links)

        return seconds

    def _hops(
        self, role: AxisRole, factors: Mapping[str, int], per_host: int
    ) -> tuple[tuple[int, int, Callable[[str, float], float]], ...]:
        """Of tokens on their way to experts: to the host, between ranks in the same place on each, and inside it."""
        hosts = factors[role.name] // per_host
        digits: dict[str, int] = {}
        for name, size in factors.items():
            digits |= {"hosts": hosts, name: per_host} if name == role.name else {name: size}
        across, inside = (self.cost_model.cluster.axis_links(digits, name) for name in ("hosts", role.name))
        return (
            (hosts, hosts, self._collective_s(role, hosts, across)),
            (factors[role.name], per_host, self._collective_s(role, per_host, inside)),
        )

    def dispatch_seconds(self, mesh: MeshShape, local_batch: int) -> tuple[float, float]:
        """Of a microbatch through the whole model, forward and backward: what sending tokens to experts takes at
        least."""
        if mesh.expert_ranks == 1 or self.job.experts == "gather":
            return 0.0, 0.0
        key = mesh.of_stage, local_batch
        if key not in self._dispatches:
            on, sums = self.mesh(*key), {"forward": 0.0, "backward": 0.0}
            for node, listed, count in self._expert_ops():
                sums[node.meta.get("phase", "forward")] += count * least_dispatch_s(on, node, listed)
            self._dispatches[key] = sums["forward"], sums["backward"]
        return self._dispatches[key]

    # ------------------------------------------------------------------ solving

    def _demands(self, mesh: Mesh) -> Demands:
        def inputs(name: str, sizes: Sizes) -> Places:
            dim = self.graph.batch_dims.get(name.removeprefix("input:"), R)
            is_cut = dim != R and sizes.batched[dim]
            return tuple(dim if is_cut and axis.role.carries_batch and axis.size > 1 else R for axis in mesh.axes)

        own = [placement_axes().index(axis.name) for axis in mesh.axes]
        return Demands(inputs, self.wishes, self._pinned.on(own))

    def _problem(self, key: Key) -> tuple[Mesh, Build]:
        if key not in self._problems:
            narrow = {name for name in placement_axes() if key[0].size(name) == 1}
            if narrow & self.pins.split_axes:
                pin = next(pin for pin in self.pins.pins if pin.splits and pin.axis in narrow)
                raise cannot_meet(pin, f"{pin.axis}={key[0].size(pin.axis)}", "R")
            mesh = self.mesh(*key)
            self._problems = {key: (mesh, build(self.graph, mesh, self._demands(mesh), self._catalog))}
        return self._problems[key]

    def _solved(self, mesh: Mesh, made: Build, prices: Prices) -> _Solved:
        limit_s = min(MAX_SOLVE_S, max(LEAST_SOLVE_S, self._deadline - time.monotonic()))
        choice, proof = solve(made.problem, limit_s, price=prices.columns, prepared=made.prepared)
        if proof.status == "unknown":
            raise ShardwrightError(
                f"no placements of {self.graph.name} were found in {limit_s:g} s, for {len(choice)} choices",
                means="the integer program is larger than the time allows",
                change="--time-limit",
                works=f"--time-limit {4 * limit_s:g}",
                exit_code=ExitCode.TIME_LIMIT,
            )
        assert proof.status in ("optimal", "feasible"), proof.status  # all whole is always possible
        return _Solved(
            mesh, tuple(read_choice(self.graph, made, choice, [a.role.grads_partial for a in mesh.axes])), made, proof
        )

    def _solve(self, key: Key) -> ShardingSolution:
        """Fastest; where that splits hardly anything, as on models too small to be worth the traffic, or where it is
        asked for, smallest."""
        started = time.perf_counter()
        mesh, made = self._problem(key)
        cuts_params = key[0].tensor_ranks > 1
        has_choice = cuts_params or key[0].sequence_ranks > 1
        solved = self._solved(mesh, made, Prices())
        found = self._figures(key, solved, started)
        least_s = found.lower_bound_s
        once = self._once_a_step(key)

        def seconds(point: ShardingSolution) -> float:
            """Of a microbatch, with its part of what comes once a step."""
            return point.objective_s + once.sums * point.exposed_s + once.state * point.state_bytes

        least = once.state * self._least_state(key) if cuts_params else 0.0
        if cuts_params and seconds(found) - found.objective_s - least > WORTH * found.objective_s:
            prices = once if found.exposed_s > 0 else replace(once, sums=0.0)
            other = self._solved(mesh, made, prices)
            figures = self._figures(key, other, started)
            if seconds(figures) < seconds(found):
                solved, found = other, figures
        if has_choice and (self.job.prefer != "time" or not self._is_of_use(solved, found)):
            prices = STATE_FIRST if self.job.prefer == "state" else LEAST_STATE
            solved = self._solved(mesh, made, replace(prices, sums=once.sums))
            found = self._figures(key, solved, started)
        self.moves[key] = {name: moves(self._placed(segment, solved)) for name, segment in self.graph.segments.items()}
        return replace(found, lower_bound_s=min(least_s, found.objective_s))

    def _figures(self, key: Key, solved: _Solved, started: float) -> ShardingSolution:
        found = {name: evaluate(self._placed(segment, solved)) for name, segment in self.graph.segments.items()}
        costs = {name: cost.counted_in(self.job.kinds.compute) for name, cost in found.items()}

        def total(name: str) -> float:
            return sum(self.counts[n] * getattr(c, name) for n, c in costs.items())

        backward_s = total("backward_s") + total("backward_comm_s")
        objective = total("forward_s") + total("forward_comm_s") + backward_s
        trained, frozen = total("trainable_elements"), total("param_elements") - total("trainable_elements")
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
            state_bytes=trained * self.job.kinds.of_trained + frozen * self.job.kinds.compute,
            exposed_s=self.sums(key[0]).exposed_s(trained, total("summed_elements"), backward_s),
            split_shares=self._split_shares(solved),
            expert_chunks=solved.mesh.expert_chunks,
        )

    def _split_shares(self, solved: _Solved) -> dict[str, dict[str, float]]:
        """Of each axis that cuts parameters: the shares of them, and of bytes kept for the backward, that it splits."""
        found: dict[str, dict[str, float]] = {}
        for axis, solution in zip(solved.mesh.axes, solved.solutions, strict=True):
            if axis.role.params_whole:
                continue
            sums = {"parameters": [0.0, 0.0], "activations": [0.0, 0.0]}
            for name, segment in self.graph.segments.items():
                for slot, shape in enumerate(segment.param_shapes):
                    is_here = solution.places.get((name, slot_name(PARAM, slot)), R) >= 0
                    _add(sums["parameters"], self.counts[name] * torch.Size(shape).numel(), is_here)
                for source, output in self._facts[name].saved:
                    num_bytes = self.counts[name] * solved.mesh.sizes(source, output).num_bytes
                    is_here = solution.read_from(name, source, output, "backward") >= 0
                    _add(sums["activations"], num_bytes, is_here)
            found[axis.name] = {kind: split / whole if whole else 0.0 for kind, (split, whole) in sums.items()}
        return found

    def _placed(self, segment: Segment, solved: _Solved) -> Placed:
        return Placed(segment, solved.mesh, solved.solutions, self._facts[segment.name])

    def _is_of_use(self, solved: _Solved, found: ShardingSolution) -> bool:
        """Do the axes that cut parameters split any to speak of, or work? Do those that cut sequences split work?"""
        axes = solved.mesh.axes
        cutting = [k for k, axis in enumerate(axes) if axis.role.cuts_params and axis.size > 1]
        along = [k for k, axis in enumerate(axes) if axis.role.carries_sequence and axis.size > 1]
        split = max((shares["parameters"] for shares in found.split_shares.values()), default=0.0)
        if along and self._split_work(solved, along) < MIN_SPLIT_FLOPS:
            return False
        return not cutting or split >= MIN_SPLIT_PARAMS or self._split_work(solved, cutting) >= MIN_SPLIT_FLOPS

    def _split_work(self, solved: _Solved, axes: Sequence[int]) -> float:
        """The share of the matrix products that any of these axes splits."""
        whole = done = 0.0
        for name, segment in self.graph.segments.items():
            placed = self._placed(segment, solved)
            for node, flops in placed.facts.model_flops.items():
                whole += flops * self.counts[name]
                strategies = placed.strategies(node)
                done += flops * self.counts[name] * any(is_split(strategies[k]) for k in axes)
        return done / whole if whole else 0.0

    # ------------------------------------------------------------------ figures

    def _boundary_bytes(self, solved: _Solved) -> dict[str, int]:
        found: dict[str, int] = {}
        for instance in self.graph.instances:
            segment = self.graph.segments[instance.segment]
            for names, infos, kind in (
                (instance.inputs, segment.inputs, INPUT),
                (instance.outputs, segment.outputs, OUTPUT),
            ):
                for slot, (name, info) in enumerate(zip(names, infos, strict=True)):
                    sizes = solved.mesh.measure(torch.Size(info.shape), info.dtype)
                    key = (segment.name, slot_name(kind, slot))
                    places = tuple(s.places.get(key, R) for s in solved.solutions)
                    found[name] = int(sizes.num_bytes / shares(places, solved.mesh.counts))
        return found

    def _conservative(self, solved: _Solved) -> list[ConservativeOp]:
        rows = []
        for name, node in solved.made.unknown:
            placed = self._placed(self.graph.segments[name], solved)
            cost = self.op_seconds(node, *op_load(placed, node)) * self.counts[name]
            rows.append(
                ConservativeOp(op=str(node.target), node=f"{name}.{node.name}", source=source_of(node), cost_s=cost)
            )
        return rows


def sequence_lengths(graph: ModelGraph) -> frozenset[int]:
    """Of what the model is given: sizes of the dimension after the samples'."""
    dims = {name: graph.batch_dims.get(name.removeprefix("input:"), R) for name in graph.input_names}
    after = [graph.values[name].shape[dim + 1 : dim + 2] for name, dim in dims.items() if dim >= 0]
    return frozenset(size for sizes in after for size in sizes if size > 1)


def _dtype(node: fx.Node) -> torch.dtype:
    for tensor in view_of(node).inputs:
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def _add(sums: list[float], amount: float, is_split_here: bool) -> None:
    sums[0] += amount * is_split_here
    sums[1] += amount


def _beats(faster: ShardingSolution, other: ShardingSolution) -> bool:
    """A faster point that is no larger in either kind of bytes."""
    return faster.saved_bytes <= other.saved_bytes and faster.state_bytes <= other.state_bytes
