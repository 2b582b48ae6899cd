"""The sharding problem of a whole model on a mesh of one to four axes, over its distinct segments.

Every option is joint: one placement, or one strategy, for each axis of the mesh. Variables:
    op         one per op of each distinct segment's joint graph: which strategies it runs         (_add_ops)
    param      one per distinct parameter slot; slots that ever hold the same parameter are one    (add_params)
    value      one per class of boundary values: an instance's output and the input slots that
               read it lie the same way, so a segment stored once is rewritten once                (add_boundaries)
    gradient   the same for gradients of boundary values                                           (add_boundaries)
    copy       the form in which one result reaches several readers of a phase                     (_add_copy)
    kept       the form in which a result is kept for the backward: the producer's own, or that
               of the copy which the forward's readers share                                       (_add_kept)
    sum        the form in which the gradient of a parameter leaves the graph: on an axis on which
               the parameter is whole it may be a partial sum, which the runtime adds up           (_add_param_gradient)

Costs, in seconds per microbatch, times the number of instances of the segment:
    op         compute time of the local share                                                     (_op_costs)
    param      the price of the bytes of training state on a rank                                  (add_params)
    edge       producer -> copy -> reader, reader -> boundary: the cheapest sequence of collectives
               between the two placements (mesh.Mesh.transfer_s)                                   (_join)
    kept       the price of the bytes kept from forward to backward                                (_weigh)
    gradient of a parameter -> sum: nothing when a partial sum stays one, otherwise the collective
               between them; sum -> parameter: nothing                                             (_add_param_gradient)
    sum        its part of the step's collective over the axes on which it is partial, and over
               the data axes, at the price of a second of the step's end                           (_add_param_gradient)

Three weights have prices that each solve names (SAVED, STATE, SUMS): bytes kept from forward to backward, bytes of
training state, seconds of the sums of gradients, which come once a step. Each choice of prices gives one point of the
lower convex hull of seconds against bytes. Bounds on memory are the outer search's, which sees stages and microbatches
in flight.

An edge whose producer is a forward op and whose reader is a backward op redistributes in the backward. What segments
share (add_params, add_boundaries) stands in shared_values.py, what a variable is in variables.py.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from torch import fx

from ...errors import ExitCode, ShardwrightError
from ...ops.attention_rules import form_of, is_attention
from ...ops.catalog import strategies
from ...ops.expert_rules import form_of as form_of_experts
from ...ops.expert_rules import is_expert_op
from ...ops.placement import P, Places, R
from ...ops.strategy import Strategy
from ...profiler.graph import ModelGraph, Segment
from ...profiler.joint import flatten_outputs
from ...profiler.op_view import OpView, is_op, origin, storage_root, view_of
from ...profiler.slots import INPUT, PARAM, TANGENT, UPDATE, index_of, kind_of, slot_name
from ...profiler.work import is_view
from .expert_costs import dispatch_s
from .mesh import Mesh, Sizes
from .pins import cannot_meet
from .shared_values import add_boundaries, add_params
from .variables import COPY, OWN, SAVED, SUMS, Build, Demands, Strategies, add_weight, meets, place_variable, texts_of


def build(graph: ModelGraph, mesh: Mesh, demands: Demands, catalog: Catalog | None = None) -> Build:
    """catalog: strategies of each op, kept between problems of the same graph."""
    made = Build()
    counts: dict[str, int] = defaultdict(int)
    for instance in graph.instances:
        counts[instance.segment] += 1
    add_boundaries(graph, mesh, made, demands)
    add_params(graph, mesh, made, demands)
    catalog = catalog if catalog is not None else Catalog()
    for segment in graph.segments.values():
        _SegmentBuilder(segment, mesh, made, demands, catalog, counts[segment.name]).run()
    return made


class Catalog:
    """The view and all strategies of each op, which depend on the graph alone."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[OpView, list[Strategy], bool]] = {}

    def of(self, node: fx.Node) -> tuple[OpView, list[Strategy], bool]:
        if id(node) not in self._known:
            self._known[id(node)] = (view_of(node), *strategies(node))
        return self._known[id(node)]


class _SegmentBuilder:
    def __init__(
        self, segment: Segment, mesh: Mesh, made: Build, demands: Demands, catalog: Catalog, count: int
    ) -> None:
        self.segment, self.mesh, self.made, self.demands = segment, mesh, made, demands
        self.catalog, self.count, self.problem = catalog, count, made.problem
        self.whole: dict[str, int] = {}  # variables of placeholders that are whole everywhere
        self.results: dict[tuple[int, int], list[Places]] = {}  # of ops, by variable and output

    def run(self) -> None:
        self._add_ops()
        self._add_reads()
        self._add_results()

    # ----- variables

    def _add_ops(self) -> None:
        name = self.segment.name
        for node in self.segment.joint.graph.nodes:
            if not is_op(node):
                continue
            view, listed, known = self.catalog.of(node)
            if not known and (view.inputs or any(o is not None for o in view.outputs)):
                self.made.unknown.append((name, node))
            operands = [self.mesh.sizes(*origin(n)) for n in view.operands]
            results = [self.mesh.sizes(node, k) for k in range(len(view.outputs))]
            options = self._options(node, listed, operands, results)
            wanted = self.demands.pins.results.get((name, node.name))
            if wanted is not None:
                met = [o for o in options if meets(tuple(s.outputs[0] for s in o), wanted)]
                if not met:
                    places = texts_of([tuple(s.outputs[0] for s in o) for o in options])
                    raise cannot_meet(
                        self.demands.pins.pins.get((name, node.name)),
                        f"the result of {node.name} cannot lie so",
                        places,
                    )
                options = met
            index = self.problem.add_variable(
                self._op_costs(node, options, operands, results) * self.count, ("op", name, node.name)
            )
            self.made.op_vars[(name, node.name)] = index
            self.made.op_options[index] = options

    def _options(
        self, node: fx.Node, listed: list[Strategy], operands: list[Sizes], results: list[Sizes]
    ) -> list[Strategies]:
        """Every combination over the axes that fits the sizes; the first is whole on all of them, where no other form
        of attention is asked for."""
        found: list[Strategies] = [()]
        tensors = [*operands, *results]
        for axis in self.mesh.axes:
            here = self.mesh.fitting(axis, listed, operands, results, is_view(node))
            if self.mesh.attention != "auto" and axis.role.carries_sequence and axis.size > 1 and is_attention(node):
                here = [s for s in here if form_of(s, node) == self.mesh.attention]
            if axis.role.cuts_experts and axis.size > 1 and is_expert_op(node):
                here = self._of_form(here)
            found = [(*before, s) for before in found for s in here if self.mesh.joins(before, s, tensors)]
        if not found and is_expert_op(node):
            raise _no_such_experts(self.mesh)
        if not found:
            raise _no_such_attention(self.mesh, operands[0])
        return found

    def _of_form(self, listed: list[Strategy]) -> list[Strategy]:
        """Of an expert op, on an axis that may cut experts. Where they are whole on it, it is a part of the data axis
        like any other: the mesh without it is there for that, so that tokens are sent where nothing else is forced."""
        form = "dispatch" if self.mesh.experts == "auto" else self.mesh.experts
        found = [s for s in listed if form_of_experts(s) == form]
        return listed if not found and self.mesh.experts == "auto" else found

    def _op_costs(
        self, node: fx.Node, options: list[Strategies], operands: list[Sizes], results: list[Sizes]
    ) -> np.ndarray:
        """Seconds of each option. Compute depends on the share of work and the bytes moved alone."""
        mesh, known = self.mesh, {}
        batched = any(any(sizes.batched) for sizes in (*operands, *results))
        costs = np.empty(len(options))
        for i, option in enumerate(options):
            read = sum(
                sizes.num_bytes / mesh.shares(tuple(s.inputs[k] for s in option)) for k, sizes in enumerate(operands)
            )
            kept = mesh.moved_bytes(node, option, results)
            key = (mesh.share(option, batched), read + kept)
            if key not in known:
                known[key] = mesh.op_s(node, *key)
            costs[i] = known[key] + mesh.tie_break * kept
            if any(s.lowering for s in option):
                costs[i] += mesh.lowering_s(option, operands[0]) + mesh.ring_s(option, operands, results, known[key])
                costs[i] += dispatch_s(mesh, option, operands, known[key])
        return costs

    # ----- edges

    def _places(self, index: int, output: int) -> list[Places]:
        """Placement of result `output` under each option of a variable."""
        if index in self.made.op_options:
            if (index, output) not in self.results:
                options = self.made.op_options[index]
                self.results[index, output] = [tuple(s.outputs[output] for s in option) for option in options]
            return self.results[index, output]
        if index in self.made.kept_options:
            return [places for _, places in self.made.kept_options[index]]
        return self.made.place_options[index]

    def _join(self, producer: int, before: list[Places], reader: int, after: list[Places], sizes: Sizes) -> None:
        self.problem.add_edge(producer, reader, _table(before, after, self.mesh, sizes) * self.count)

    def _stays_with_experts(self, source: fx.Node, output: int) -> bool:
        """Is it what experts that tokens were sent to had before their activation? Its rows are those that came to each
        rank, whatever its sizes say."""
        return output == 1 and is_expert_op(source) and any(a.role.cuts_experts and a.size > 1 for a in self.mesh.axes)

    def _join_unmoved(self, producer: int, before: list[Places], reader: int, after: list[Places]) -> None:
        self.problem.add_edge(producer, reader, np.array([[0.0 if b == a else np.inf for a in after] for b in before]))

    def _variable_of(self, node: fx.Node) -> int:
        """The variable that decides where a tensor lies: its op's, or its placeholder's."""
        name = self.segment.name
        if is_op(node):
            return self.made.op_vars[(name, node.name)]
        kind = kind_of(node.name)
        if kind == PARAM:
            return self.made.slot_vars[(name, "param", index_of(node.name))]
        if kind == INPUT:
            return self.made.slot_vars[(name, "in", index_of(node.name))]
        if kind == TANGENT:
            return self.made.slot_vars[(name, "tan", self.segment.signature.tangents[index_of(node.name)])]
        if node.name not in self.whole:  # buffers and the random key
            whole = [(R,) * len(self.mesh.axes)]
            self.whole[node.name] = place_variable(self.made, whole, ("whole", name, node.name))
        return self.whole[node.name]

    def _add_reads(self) -> None:
        readers: dict[tuple[fx.Node, int], dict[str, list[tuple[fx.Node, int]]]] = defaultdict(dict)
        for node in self.segment.joint.graph.nodes:
            if is_op(node):
                phase = node.meta.get("phase", "forward")
                for position, operand in enumerate(self.catalog.of(node)[0].operands):
                    readers[origin(operand)].setdefault(phase, []).append((node, position))
        for (source, output), groups in readers.items():
            sizes = self.mesh.sizes(source, output)
            producer = self._variable_of(source)
            saved = "backward" in groups and _is_saved(source)
            base = producer
            for phase in ("forward", "backward"):
                group = groups.get(phase, [])
                if not group:
                    continue
                shared = base
                reading = [(self.made.op_vars[(self.segment.name, node.name)], position) for node, position in group]
                wanted = {
                    (reader, position): [tuple(s.inputs[position] for s in o) for o in self.made.op_options[reader]]
                    for reader, position in reading
                }
                if len({reader for reader, _ in reading}) > 1 or (saved and phase == "forward"):
                    shared = self._add_copy(source, output, phase, base, [*wanted.values()], sizes)
                for (reader, _), places in wanted.items():
                    if self._stays_with_experts(source, output):
                        self._join_unmoved(shared, self._places(shared, output), reader, places)
                    else:
                        self._join(shared, self._places(shared, output), reader, places, sizes)
                if saved and phase == "forward":
                    base = self._add_kept(source, output, producer, shared, sizes)
            if saved and "forward" not in groups:
                self._weigh(producer, self._places(producer, output), (source, output))

    def _add_copy(
        self, source: fx.Node, output: int, phase: str, producer: int, wanted: list[list[Places]], sizes: Sizes
    ) -> int:
        """On each axis a copy lies as its producer or as one of its readers has it: another form never helps."""
        used = [set(axis) for axis in zip(*self._places(producer, output), *itertools.chain(*wanted), strict=True)]
        options = self.mesh.among(sizes, used)
        index = place_variable(self.made, options, ("copy", self.segment.name, source.name, output, phase))
        self.made.copy_vars[(self.segment.name, source.name, output, phase)] = index
        self._join(producer, self._places(producer, output), index, options, sizes)
        return index

    def _add_kept(self, source: fx.Node, output: int, producer: int, copy: int, sizes: Sizes) -> int:
        """What the backward reads: the tensor as its producer made it, or as the forward's readers had it."""
        own, shared = self._places(producer, output), self.made.place_options[copy]
        options = [(OWN, p) for p in dict.fromkeys(own)] + [(COPY, p) for p in shared]
        index = self.problem.add_variable(np.zeros(len(options)), ("kept", self.segment.name, source.name, output))
        self._weigh(index, [places for _, places in options], (source, output))
        self.made.kept_vars[(self.segment.name, source.name, output)] = index
        self.made.kept_options[index] = options
        for variable, places, kind in ((producer, own, OWN), (copy, shared, COPY)):
            matrix = [[0.0 if k != kind or p == q else np.inf for k, q in options] for p in places]
            self.problem.add_edge(variable, index, np.array(matrix))
        return index

    def _weigh(self, variable: int, kept: list[Places], of: tuple[fx.Node, int]) -> None:
        """Bytes of a result from forward to backward under each option of a variable."""
        num_bytes = [self.count * self.mesh.local_bytes(*of, places) for places in kept]
        add_weight(self.made, variable, SAVED, num_bytes)

    def _add_results(self) -> None:
        """Outputs to their boundary, new buffer values whole, gradients to parameters and boundaries."""
        segment, name = self.segment, self.segment.name
        results = flatten_outputs(segment.joint.graph)
        num_outputs, num_updates = len(segment.outputs), len(segment.mutated_buffers)
        first_input = num_outputs + num_updates + len(segment.param_shapes)
        for k, node in enumerate(results):
            if not isinstance(node, fx.Node):
                continue
            source, output = origin(node)
            if k < num_outputs:
                self._end(source, output, self.made.slot_vars[(name, "out", k)])
            elif k < num_outputs + num_updates:
                whole = [(R,) * len(self.mesh.axes)]
                self._end(source, output, place_variable(self.made, whole, ("whole", name, slot_name(UPDATE, k))))
            elif k < first_input:
                slot = k - num_outputs - num_updates
                self._add_param_gradient(source, output, self.made.slot_vars[(name, "param", slot)])
            elif (name, "gin", k - first_input) in self.made.slot_vars:
                self._end(source, output, self.made.slot_vars[(name, "gin", k - first_input)])

    def _end(self, source: fx.Node, output: int, boundary: int) -> None:
        producer = self._variable_of(source)
        if producer != boundary:
            before, after = self._places(producer, output), self.made.place_options[boundary]
            self._join(producer, before, boundary, after, self.mesh.sizes(source, output))

    def _add_param_gradient(self, source: fx.Node, output: int, param: int) -> None:
        producer = self._variable_of(source)
        if producer == param:
            return
        mesh, sizes = self.mesh, self.mesh.sizes(source, output)
        data = [axis.role.grads_partial for axis in mesh.axes]  # there a shard becomes a partial sum (placement.way)
        before = self._places(producer, output)
        after = self.made.place_options[param]
        reached = list(dict.fromkeys(_unsummed(_padded(b, a, data), a) for b in before for a in after))
        index = place_variable(self.made, reached, ("sum", self.segment.name, source.name, output))
        padded = [[_padded(b, r, data) for r in reached] for b in before]
        matrix = [
            [mesh.transfer_s(sizes, b, r) if _stays(b, r) else np.inf for b, r in zip(row, reached, strict=True)]
            for row in padded
        ]
        self.problem.add_edge(producer, index, np.array(matrix) * self.count)
        ends = [[0.0 if _unsummed(r, a) == r else np.inf for a in after] for r in reached]
        self.problem.add_edge(index, param, np.array(ends))
        add_weight(self.made, index, SUMS, [self.count * mesh.sum_s(sizes, places) for places in reached])


def _no_such_attention(mesh: Mesh, query: Sizes) -> ShardwrightError:
    axis = next(axis for axis in mesh.axes if axis.role.carries_sequence)
    what = f"attention={mesh.attention} does not go with {axis.name}={axis.size} for queries of {list(query.shape)}"
    return _no_such(what, "ulysses wants heads of queries and of keys that divide, on no other axis", "attention")


def _no_such_experts(mesh: Mesh) -> ShardwrightError:
    axis = next(axis for axis in mesh.axes if axis.role.cuts_experts)
    what = f"experts={mesh.experts} does not go with {axis.name}={axis.size}"
    return _no_such(what, "the experts are no parameters of their own, or do not divide", "experts")


def _no_such(what: str, means: str, force: str) -> ShardwrightError:
    """A form that was forced, of which gather always goes."""
    return ShardwrightError(
        what, means=means, change=f"--force {force}", works=f"--force {force}=gather", exit_code=ExitCode.CONTRADICTION
    )


def _padded(found: Places, end: Places, data: Sequence[bool]) -> Places:
    """A shard on an axis where the parameter is whole and gradients are partial sums is one among zeros."""
    return tuple(P if d and place >= 0 and e in (R, P) else place for place, e, d in zip(found, end, data, strict=True))


def _unsummed(found: Places, param: Places) -> Places:
    """Where a parameter's gradient ends inside the graph: partial sums over axes on which it is whole stay so."""
    return tuple(P if f == P and p == R else p for f, p in zip(found, param, strict=True))


def _stays(found: Places, reached: Places) -> bool:
    """A partial sum is never made whole inside the graph, and a whole gradient never a partial sum."""
    return all((f == P) == (r == P) or (f == P and r >= 0) for f, r in zip(found, reached, strict=True))


def _is_saved(source: fx.Node) -> bool:
    """Made in the forward and no view of a parameter, buffer or key: the backward reads it from memory."""
    root, _ = storage_root(source)
    if root.op == "placeholder":
        return kind_of(root.name) == INPUT
    return root.meta.get("phase", "forward") == "forward"


def _table(before: list[Places], after: list[Places], mesh: Mesh, sizes: Sizes) -> np.ndarray:
    """Transfer seconds, rows by before, columns by after."""
    rows, columns = list(dict.fromkeys(before)), list(dict.fromkeys(after))
    small = np.array([[mesh.transfer_s(sizes, b, a) for a in columns] for b in rows])
    at = {p: i for i, p in enumerate(rows)}, {p: i for i, p in enumerate(columns)}
    return small[np.ix_([at[0][p] for p in before], [at[1][p] for p in after])]
