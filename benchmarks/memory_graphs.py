"""A captured model as one joint graph, and as the segments that a plan runs: the same ops either way.

Both are run op by op, freeing what nothing reads any more. Gradients of parameters are dropped as they are made, so
that live bytes are those of activations and of what is worked with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from live_bytes import all_tensors, peak_of
from torch import fx
from torch.utils.flop_counter import flop_registry, register_flop_formula

from shardwright.costmodel.segment import RecomputePoint
from shardwright.kernels.ops import make_key
from shardwright.ops.strategy import replicated
from shardwright.passes.build import own_kept
from shardwright.passes.loss import early_count, fuse_cross_entropy_backward
from shardwright.passes.partition import Recompute, partition
from shardwright.passes.redistribute import MeshAxis
from shardwright.passes.reuse import reuse
from shardwright.passes.shard import ShardContext, shard_segment
from shardwright.passes.tidy import tidy
from shardwright.passes.values import propagate
from shardwright.planner.stages.chain import Shape, points_of
from shardwright.plans.placements import AxisSolution
from shardwright.profiler.batches import make_batch
from shardwright.profiler.graph import ModelGraph, Segment, SegmentInstance
from shardwright.profiler.initial_values import materialize
from shardwright.profiler.op_view import is_op, view_of
from shardwright.profiler.slots import INPUT_GRAD, OUTPUT, PARAM_GRAD, kind_of
from shardwright.profiler.work import attention_pairs
from shardwright.profiler.workload import Workload

SHARE = "input:(share)"  # of a microbatch in all samples
SEED = 3


@register_flop_formula(torch.ops.shardwright.attention)
def _attention_flops(query: Any, key: Any, value: Any, *others: Any, **_: Any) -> int:
    causal, window = others[3:5]  # after mask, key of the generator and scale
    batch, heads, queries, dim = query
    return int(2 * batch * heads * attention_pairs(queries, key[2], causal, window) * (dim + value[3]))


@register_flop_formula(torch.ops.shardwright.attention_backward)
def _attention_backward_flops(grad_out: Any, query: Any, key: Any, value: Any, *others: Any, **_: Any) -> int:
    causal, window = others[5:7]  # after mask, key of the generator, out, lse and scale
    batch, heads, queries, dim = query
    return int(2 * batch * heads * attention_pairs(queries, key[2], causal, window) * (3 * dim + 2 * value[3]))


@dataclass
class Model:
    """joints: of each distinct segment, as one device runs it. tensors: parameters, buffers and the batch, by name."""

    graph: ModelGraph
    joints: dict[str, fx.GraphModule]
    tensors: dict[str, torch.Tensor]

    @property
    def trained(self) -> list[SegmentInstance]:
        return [instance for instance in self.graph.instances if not self.graph.segments[instance.segment].is_prologue]

    def totals(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers of the whole batch, as far as they are known: those of its one microbatch."""
        return {f"input:{e}": values[part] for e, (part, _) in self.graph.totals.items() if part in values}

    def given(self, instance: SegmentInstance) -> list[torch.Tensor]:
        return [self.tensors[name] for name in (*instance.params, *instance.buffers)]


def build_model(workload: Workload, graph: ModelGraph, batch: int) -> Model:
    model = materialize(workload).model
    tensors = dict(graph.constants) if hasattr(graph, "constants") else {}
    tensors |= {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    tensors |= {f"input:{name}": tensor for name, tensor in make_batch(workload, batch, seed=SEED).items()}
    tensors[SHARE] = torch.tensor(1.0)
    alone = MeshAxis("", 1, 0, "")
    ops = [(name, node) for name, s in graph.segments.items() for node in s.joint.graph.nodes if is_op(node)]
    nowhere = AxisSolution({(name, node.name): replicated(view_of(node)) for name, node in ops})
    context = ShardContext((alone,), (nowhere,), torch.device("cpu"))
    joints = {}
    for name, segment in graph.segments.items():
        joint = joints[name] = shard_segment(segment, context)
        given = {n.name: n.meta.get("val") for n in segment.joint.graph.nodes if n.op == "placeholder"}
        metas = {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in given.items() if _is_tensor(v)}
        propagate(joint.graph, metas, context.device)
    return Model(graph, joints, tensors)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _results(segment: Segment, joint: fx.GraphModule) -> dict[str, Any]:
    return dict(zip(segment.signature.results, joint.graph.output_node().args[0], strict=True))  # type: ignore[arg-type]


class _Interpreter(fx.Interpreter):
    """dropped: results that nobody keeps."""

    def __init__(self, module: fx.GraphModule, dropped: set[str]) -> None:
        super().__init__(module)
        self.dropped = dropped

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return None if n.name in self.dropped and all(user.op == "output" for user in n.users) else result


# ---------------------------------------------------------------------- one graph


@dataclass
class Whole:
    """The joint graph of the whole model. inputs: their values, in the placeholders' order, the tangent last. block_of:
    of each node of a forward, the instance that it belongs to."""

    module: fx.GraphModule
    inputs: list[torch.Tensor]
    block_of: dict[str, int] = field(default_factory=dict)


def whole_graph(model: Model) -> Whole:
    """Gradients of a value that several instances read are added up as soon as they are made."""
    graph, made = fx.Graph(), _Stitching(model)
    made.graph = graph
    for name, tensor in model.tensors.items():
        if any(name in (*i.params, *i.buffers, *i.inputs) for i in model.graph.instances):
            made.value[name] = made.placeholder(f"primals_{len(made.inputs)}", tensor)
    for instance in model.graph.instances:
        made.value[f"key {instance.index}"] = made.placeholder(
            f"primals_{len(made.inputs)}", make_key(SEED, 1, 1, instance.random_base)
        )
    made.gradient[model.graph.loss] = made.placeholder("tangents_0", torch.tensor(1.0))
    for instance in model.graph.instances:
        made.forward(instance)
    for instance in reversed(model.trained):
        made.backward(instance)
    graph.output((made.value[model.graph.loss], *made.of_params))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Whole(module, made.inputs, made.block_of)


class _Stitching:
    def __init__(self, model: Model) -> None:
        self.model, self.graph = model, fx.Graph()
        self.inputs: list[torch.Tensor] = []
        self.value: dict[str, fx.Node] = {}
        self.gradient: dict[str, fx.Node] = {}
        self.of_params: list[fx.Node] = []
        self.block_of: dict[str, int] = {}
        self.env: dict[int, dict[fx.Node, fx.Node]] = {}
        self.mode = next(
            node.meta["val"].fake_mode
            for joint in model.joints.values()
            for node in joint.graph.nodes
            if hasattr(node.meta.get("val"), "fake_mode")
        )

    def placeholder(self, name: str, tensor: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(tensor)
        self.inputs.append(tensor)
        return node

    def forward(self, instance: SegmentInstance) -> None:
        segment, joint = self.model.graph.segments[instance.segment], self.model.joints[instance.segment]
        env = self.env[instance.index] = {}
        given = [*instance.params, *instance.buffers, *instance.inputs, f"key {instance.index}"]
        placeholders = [node for node in joint.graph.nodes if node.op == "placeholder"]
        for node, name in zip(placeholders, given, strict=False):
            env[node] = self.value[name]
        for node in joint.graph.nodes:
            if node.op == "call_function" and node.meta.get("phase") != "backward":
                env[node] = self.graph.node_copy(node, env.__getitem__)
                self.block_of[env[node].name] = instance.index
        results = _results(segment, joint)
        outputs = [node for name, node in results.items() if kind_of(name) == OUTPUT]
        self.value |= {name: env[node] for name, node in zip(instance.outputs, outputs, strict=True)}
        self.value |= self.model.totals(self.value)

    def backward(self, instance: SegmentInstance) -> None:
        segment, joint = self.model.graph.segments[instance.segment], self.model.joints[instance.segment]
        env = self.env[instance.index]
        tangents = [n for n in joint.graph.nodes if n.op == "placeholder" and n.name.startswith("tangent_")]
        wanted = [name for name, out in zip(instance.outputs, segment.outputs, strict=True) if out.requires_grad]
        env |= {node: self.gradient[name] for node, name in zip(tangents, wanted, strict=True)}
        for node in joint.graph.nodes:
            if node.op == "call_function" and node.meta.get("phase") == "backward":
                env[node] = self.graph.node_copy(node, env.__getitem__)
        results = _results(segment, joint)
        grads = {name: env[node] for name, node in results.items() if isinstance(node, fx.Node) and node in env}
        self.of_params += [node for name, node in grads.items() if kind_of(name) == PARAM_GRAD]
        for slot, name in enumerate(instance.inputs):
            found = grads.get(f"{INPUT_GRAD}_{slot}")
            if found is not None:
                self.gradient[name] = self._sum(self.gradient[name], found) if name in self.gradient else found

    def _sum(self, one: fx.Node, other: fx.Node) -> fx.Node:
        node = self.graph.call_function(torch.ops.aten.add.Tensor, (one, other))
        node.meta["val"] = one.meta["val"]
        return node


def rewrite(forward: fx.GraphModule, backward: fx.GraphModule, kept: Sequence[str]) -> None:
    """The passes that every program of a plan goes through, but for those that write gradients where they are added
    up."""
    early_count(forward.graph)
    own = own_kept(forward.graph, list(kept))
    for module, owned in ((forward, frozenset[str]()), (backward, own)):
        if module is backward:
            fuse_cross_entropy_backward(module.graph)
        tidy(module.graph)
        reuse(module.graph, owned)
        module.recompile()


def run_pair(whole: Whole, forward: fx.GraphModule, backward: fx.GraphModule) -> float:
    """A step of a partitioned joint graph; returns the loss. What the backward is given it frees as it goes."""
    given = {node.name: value for node, value in zip(_placeholders(whole.module), whole.inputs, strict=True)}
    arguments = [given[node.name] for node in _placeholders(forward)]
    loss, *kept = _Interpreter(forward, set()).boxed_run(arguments)
    value = float(loss)
    arguments = [*kept, whole.inputs[-1]]
    del kept, loss
    outputs: Any = backward.graph.output_node().args[0]
    _Interpreter(backward, {node.name for node in outputs if isinstance(node, fx.Node)}).boxed_run(arguments)
    return value


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


# ---------------------------------------------------------------------- segments


class Segments:
    """The program of a plan: segment by segment, each of which keeps until its backward is done what it is given."""

    def __init__(self, model: Model, shape: Shape, solution: Any) -> None:
        self.model, self.shape, self.solution = model, shape, solution
        self.made: dict[Any, Any] = {}

    def run(self, levels: Sequence[int]) -> float:
        """levels: of each position, the place in its segment's recompute points; -1: everything is kept."""
        model = self.model
        points = iter(points_of(self.shape, self.solution, tuple(levels)))
        values = {name: model.tensors[name] for name in (*model.graph.input_names, SHARE) if name in model.tensors}
        left = self._last_readers()
        kept: dict[int, tuple[Any, list[Any]]] = {}
        for instance in model.graph.instances:
            segment = model.graph.segments[instance.segment]
            forward, backward, *_ = parts = self._parts(instance.segment, self._recompute(instance, points))
            key = make_key(SEED, 1, 1, instance.random_base)
            arguments = [*model.given(instance), *(values[name] for name in instance.inputs), key]
            found = list(_Interpreter(forward, set()).boxed_run(arguments))
            count = len(segment.outputs)
            values |= zip(instance.outputs, found[:count], strict=True)
            values |= model.totals(values)
            if backward is not None:
                kept[instance.index] = parts, found[count + len(segment.mutated_buffers) :]
            del found
            for name in [name for name, last in left.items() if last <= instance.index and name in values]:
                if name != model.graph.loss:
                    del values[name]
        loss = float(values[model.graph.loss])
        self._backward(kept)
        return loss

    def _backward(self, kept: dict[int, tuple[Any, list[Any]]]) -> None:
        model = self.model
        gradients: dict[str, Any] = {model.graph.loss: torch.tensor(1.0)}
        for instance in reversed(model.trained):
            if instance.index not in kept:
                continue
            segment = model.graph.segments[instance.segment]
            (_, backward, dropped, _), saved = kept.pop(instance.index)
            wanted = [name for name, out in zip(instance.outputs, segment.outputs, strict=True) if out.requires_grad]
            tangents = [gradients[name] for name in wanted]
            key = make_key(SEED, 1, 1, instance.random_base)
            arguments = [*model.given(instance), key, *saved, *tangents]
            found = _Interpreter(backward, dropped).boxed_run(arguments)[len(segment.param_shapes) :]
            for name in wanted:
                del gradients[name]
            del saved, tangents
            for name, gradient in zip(instance.inputs, found, strict=True):
                if gradient is not None:
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
            del found

    def flops(self, levels: Sequence[int]) -> int:
        points = iter(points_of(self.shape, self.solution, tuple(levels)))
        return sum(self._parts(i.segment, self._recompute(i, points))[3] for i in self.model.graph.instances)

    def _recompute(self, instance: SegmentInstance, points: Iterator[RecomputePoint | None]) -> Recompute:
        is_prologue = self.model.graph.segments[instance.segment].is_prologue
        point = None if is_prologue else next(points)
        return False if point is None else point.is_whole or point.recomputed

    def _parts(self, name: str, recompute: Recompute) -> Any:
        key = name, recompute if isinstance(recompute, bool) else tuple(recompute)
        if key not in self.made:
            segment = self.model.graph.segments[name]
            forward, backward, kept = partition(self.model.joints[name], segment, recompute)
            outputs: Any = backward.graph.output_node().args[0] if backward is not None else ()
            grads = outputs[: len(segment.param_shapes)]
            dropped = {node.name for node in grads if isinstance(node, fx.Node)}
            flops = counted_flops(forward, backward)
            if backward is not None:
                rewrite(forward, backward, kept)
            self.made[key] = forward, backward, dropped, flops
        return self.made[key]

    def _last_readers(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for instance in self.model.graph.instances:
            last |= dict.fromkeys((*instance.inputs, *instance.outputs), instance.index)
        return last


# ---------------------------------------------------------------------- figures


def measured_peak(call: Any) -> int:
    """Most live bytes of a step beyond those that are there before."""
    live = peak_of(call, all_tensors())
    return live.peak_bytes - live.begun_bytes


def counted_flops(*modules: fx.GraphModule | None) -> int:
    """By the formulas of torch's flop counter, which the partitioner weighs too."""
    total = 0
    for node in [node for module in modules if module is not None for node in module.graph.nodes]:
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if formula is not None:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
            total += int(formula(*args, **kwargs, out_val=node.meta["val"]))
    return total
