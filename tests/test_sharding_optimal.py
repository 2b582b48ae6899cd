"""The sharding solver finds the least cost over every choice: random graphs of up to six ops on meshes of 2, 4 and 2x2.

The oracle prices each op and each tensor by itself, with collectives found by shortest paths over placements, and takes
the least of all combinations.
"""

from __future__ import annotations

import itertools
import random

import networkx as nx
import numpy as np
import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from shardwright.ops.catalog import strategies
from shardwright.ops.placement import P, Places, R, can_shard, route, transition
from shardwright.planner.sharding.mesh import Axis, Mesh, Sizes, compatible
from shardwright.planner.sharding.problem import build
from shardwright.planner.sharding.solve.pbqp import solve
from shardwright.planner.sharding.variables import Demands
from shardwright.profiler.graph import ModelGraph, Segment, SegmentInstance, ValueInfo
from shardwright.profiler.op_view import is_op, operands_of

MOST_COMBINATIONS = 150_000
ALPHA_S, PER_BYTE_S, FLOP_S = 2e-6, 1e-9, 3e-8
SHARE = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 0.6}


def collective_s(size: int, slowness: float):
    def seconds(kind: str, num_bytes: float) -> float:
        return slowness * SHARE[kind] * (ALPHA_S + PER_BYTE_S * num_bytes * (size - 1) / size)

    return seconds


def nothing_s(num_bytes: float) -> float:
    """Local copies are free here: the oracle counts collectives."""
    return 0.0


def op_s(node: fx.Node, share: float, moved: float) -> float:
    return node.meta["val"].numel() * FLOP_S * share + moved * 1e-11


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
    axes = tuple(Axis(f"a{k}", n, collective_s(n, 1.0 + 2.0 * (len(sizes) - 1 - k))) for k, n in enumerate(sizes))
    # outer axes are the slower ones, as in a cluster
    return Mesh(axes, 1, 1, op_s, nothing_s, tie_break=0.0)


OPS = (
    lambda draw, x, y: torch.relu(x),
    lambda draw, x, y: x * 2.0,
    lambda draw, x, y: x.t(),
    lambda draw, x, y: x @ y.t() if x.shape[1] == y.shape[1] else torch.exp(x),
    lambda draw, x, y: x @ y if x.shape[1] == y.shape[0] else torch.tanh(x),
    lambda draw, x, y: x + y if x.shape == y.shape else torch.neg(x),
    lambda draw, x, y: x * y if x.shape == y.shape else x + 1.0,
    lambda draw, x, y: torch.softmax(x, dim=draw.randrange(2)),
    lambda draw, x, y: x.sum(0, keepdim=True).expand(x.shape).clone(),
)


def random_graph(seed: int) -> ModelGraph:
    """A forward graph of at most six ops on matrices, as a model of one segment."""
    draw = random.Random(seed)
    count = draw.randint(2, 6)

    def program(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made = [a, b]
        while True:
            x, y = draw.choice(made[-3:]), draw.choice(made)
            made.append(draw.choice(OPS)(draw, x, y))
            if len(made) >= count:
                return made[-1]

    shapes = draw.choice([((8, 8), (8, 8)), ((8, 16), (16, 8)), ((4, 8), (8, 4)), ((8, 6), (8, 6))])
    joint = make_fx(program, tracing_mode="fake")(*(torch.zeros(s) for s in shapes))
    for k, node in enumerate(n for n in joint.graph.nodes if n.op == "placeholder"):
        node._rename(f"input_{k}")
        node.target = f"input_{k}"
    for node in joint.graph.nodes:
        node.meta["phase"] = "forward"
    out = next(n for n in joint.graph.nodes if n.op == "output")
    out.args = ((out.args[0],),)
    infos = [ValueInfo(f"input:{k}", tuple(s), torch.float32, False) for k, s in enumerate(shapes)]
    result = ValueInfo("s/0", tuple(out.args[0][0].meta["val"].shape), torch.float32, False)
    segment = Segment("s", joint, joint, (), (), (), 0, (), tuple(infos), (result,), False, "")
    instance = SegmentInstance(0, "s", (), (), tuple(i.name for i in infos), ("s/0",), 0, "")
    values = {info.name: info for info in (*infos, result)}
    names = tuple(info.name for info in infos)
    return ModelGraph("random", {"s": segment}, [instance], values, names, {}, {}, loss="s/0", batch_size=1)


# --------------------------------------------------------------------------- the oracle


def paths(shape: tuple[int, ...], num_bytes: float, mesh: Mesh) -> dict[Places, dict[Places, float]]:
    """Seconds between all placements of a tensor: shortest paths, one collective on one axis an edge."""
    sizes = mesh.counts
    places = [
        p
        for p in itertools.product(*([R, P, *range(len(shape))] for _ in sizes))
        if len({d for d in p if d >= 0}) == sum(d >= 0 for d in p)
        and all(d < 0 or can_shard(shape[d], n) for d, n in zip(p, sizes, strict=True))
    ]
    graph = nx.DiGraph()
    graph.add_nodes_from(places)
    for before, after in itertools.permutations(places, 2):
        changed = [k for k in range(len(sizes)) if before[k] != after[k]]
        if len(changed) == 1:
            (k,) = changed
            kind = transition(before[k], after[k])
            if kind is None:
                continue
            others = [n for j, n in enumerate(sizes) if j != k and before[j] >= 0]
            whole = num_bytes / np.prod(others) if others else num_bytes
            seconds = mesh.axes[k].collective_s(kind, whole) if kind != "local" else 0.0
            graph.add_edge(before, after, weight=seconds)
    return dict(nx.all_pairs_dijkstra_path_length(graph))


def least_cost(graph: ModelGraph, mesh: Mesh) -> float | None:
    """Of every combination of strategies; None where there are too many to try."""
    nodes = [n for n in graph.segments["s"].joint.graph.nodes if is_op(n)]
    options = {n: list(_joint(n, mesh)) for n in nodes}
    if np.prod([len(o) for o in options.values()], dtype=float) > MOST_COMBINATIONS:
        return None
    at = {node: k for k, node in enumerate(nodes)}
    total = np.zeros([len(options[n]) for n in nodes])

    def spread(table: np.ndarray, scope: list[fx.Node]) -> np.ndarray:
        order = sorted(range(len(scope)), key=lambda i: at[scope[i]])
        shape = [1] * len(nodes)
        for i in order:
            shape[at[scope[i]]] = table.shape[i]
        return table.transpose(order).reshape(shape)

    for node in nodes:
        total = total + spread(np.array([_op_cost(node, o, mesh) for o in options[node]]), [node])
    output = next(n for n in graph.segments["s"].joint.graph.nodes if n.op == "output").args[0][0]
    whole = (R,) * len(mesh.axes)
    for source in graph.segments["s"].joint.graph.nodes:
        if source.op == "output":
            continue
        val = source.meta["val"]
        known = paths(tuple(val.shape), val.numel() * val.element_size(), mesh)
        made = [tuple(s.outputs[0] for s in o) for o in options[source]] if source in at else [whole]
        readers = {n: [k for k, x in enumerate(operands_of(n)) if x is source] for n in nodes}
        readers = {n: slots for n, slots in readers.items() if slots}
        scope = ([source] if source in at else []) + list(readers)
        if readers:
            forms = list(known) if len(readers) > 1 else []
            sizes = ([len(made)] if source in at else []) + [len(options[n]) for n in readers]
            best = np.full(sizes, np.inf)
            if len(readers) == 1:
                best = _readings(made, None, readers, options, known, source in at)
            for form in forms:
                best = np.minimum(best, _readings(made, form, readers, options, known, source in at))
            total = total + spread(best, scope)
        if source is output:
            ends = np.array([known[m][whole] for m in made])
            total = total + (spread(ends, [source]) if source in at else ends[0])
    return float(total.min())


def _readings(made, form, readers, options, known, is_made) -> np.ndarray:
    """Seconds over (producer, readers): to the shared form, and from it to what each reader wants."""
    parts = []
    for node, slots in readers.items():
        wanted = [{tuple(s.inputs[k] for s in o) for k in slots} for o in options[node]]
        rows = [[sum(known[start].get(w, np.inf) for w in ws) for ws in wanted] for start in ([form] if form else made)]
        parts.append(np.array(rows))
    if form:
        table = np.array([known[m].get(form, np.inf) for m in made])
        for part in parts:
            table = table[..., None] + part[0]
        return table if is_made else table[0]
    return parts[0] if is_made else parts[0][0]


def _joint(node: fx.Node, mesh: Mesh):
    tensors = [*(n.meta["val"] for n in operands_of(node)), node.meta["val"]]
    per_axis = [
        [
            s
            for s in strategies(node)[0]
            if not s.of_sequence
            and all(
                p < 0 or can_shard(t.shape[p], n, s.even) for p, t in zip((*s.inputs, *s.outputs), tensors, strict=True)
            )
        ]
        for n in mesh.counts
    ]  # fmt: skip
    for choice in itertools.product(*per_axis):
        if all(compatible(a, b) for a, b in itertools.combinations(choice, 2)):
            yield choice


def _op_cost(node: fx.Node, option, mesh: Mesh) -> float:
    tensors = [*(n.meta["val"] for n in operands_of(node)), node.meta["val"]]
    moved, share = 0.0, 1.0
    for k, tensor in enumerate(tensors):
        parts = [n for s, n in zip(option, mesh.counts, strict=True) if (*s.inputs, *s.outputs)[k] >= 0]
        moved += tensor.numel() * tensor.element_size() / (np.prod(parts) if parts else 1)
    for strategy, n in zip(option, mesh.counts, strict=True):
        if any(p >= 0 for p in (*strategy.inputs, *strategy.outputs)) or strategy.lowering:
            share /= n
    seconds = op_s(node, share, moved)
    first = operands_of(node)[0].meta["val"]
    for k, strategy in enumerate(option):
        if strategy.lowering:  # softmax over a split dimension: maximum and sum, one value a row
            rows = first.numel() / first.shape[-1]
            rows /= np.prod([n for j, n in enumerate(mesh.counts) if j != k and option[j].inputs[0] >= 0] or [1])
            seconds += 2 * mesh.axes[k].collective_s("all_reduce", rows * first.element_size())
    return seconds


# --------------------------------------------------------------------------- tests


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)])
def test_least_of_every_choice_on_random_graphs(sizes: tuple[int, ...]) -> None:
    tried, split = 0, 0
    for seed in itertools.count():
        graph, mesh = random_graph(seed), mesh_of(sizes)
        best = least_cost(graph, mesh)
        if best is None:
            continue
        whole = (R,) * len(mesh.axes)
        made = build(graph, mesh, Demands(lambda name, sizes, whole=whole: whole))
        choice, proof = solve(made.problem)
        assert proof.status == "optimal" and proof.gap_fraction <= 1e-9
        assert made.problem.objective(choice) == pytest.approx(best, rel=1e-6), f"{seed=}"
        split += any(s.outputs[0] >= 0 for v, o in made.op_options.items() for s in o[choice[v]])
        tried += 1
        if tried == 100:
            break
    assert split > 20, "costs must make splitting worth while now and then"


@pytest.mark.parametrize(("sizes", "slack"), [((2, 2), 0.0), ((2, 2, 2), 0.05)])
def test_no_order_of_one_collective_an_axis_is_cheaper_than_the_route(sizes: tuple[int, ...], slack: float) -> None:
    """Routes count bytes and know no latencies: with three axes these can favour another order by a little."""
    mesh, shape = mesh_of(sizes), torch.Size((16, 16, 16))
    measured = mesh.measure(shape, torch.float32)
    compared = parted = 0
    for before, after in itertools.permutations(mesh.domain(measured, partial=True), 2):
        changed = [k for k in range(len(sizes)) if before[k] != after[k]]
        costs = [_in_order(before, after, order, mesh, measured) for order in itertools.permutations(changed)]
        steps = route(before, after)
        if steps is None:
            assert all(cost is None for cost in costs)
        elif len(steps) > len(changed):  # two axes swap dimensions: no order does without a step more
            assert all(cost is None for cost in costs)
            parted += 1
        else:
            least = min(cost for cost in costs if cost is not None)
            assert least * (1 - 1e-12) <= mesh.transfer_s(measured, before, after) <= least * (1 + slack + 1e-12)
            compared += 1
    assert compared > 10 * parted > 0


def _in_order(before: Places, after: Places, order: tuple[int, ...], mesh: Mesh, sizes: Sizes) -> float | None:
    """Seconds of the collectives in this order; None where one would cut a dimension that another axis still cuts."""
    current, seconds = list(before), 0.0
    for k in order:
        others = {p for j, p in enumerate(current) if j != k and p >= 0}
        kind = transition(current[k], after[k])
        if kind is None or others & {p for p in (current[k], after[k]) if p >= 0}:
            return None
        whole = sizes.num_bytes / np.prod([n for j, n in enumerate(mesh.counts) if j != k and current[j] >= 0] or [1])
        seconds += mesh.axes[k].collective_s(kind, whole) if kind != "local" else 0.0
        current[k] = after[k]
    return seconds
