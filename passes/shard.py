"""The SPMD pass: a joint graph over whole tensors becomes this rank's joint graph over its shards.

For each op the plan gives a strategy on every mesh axis. Operands are brought to the strategy's placements by the
cheapest collectives (redistribute.py), each at most once in a phase; the op then runs on local tensors, with size
arguments made local, or as its lowering (lowerings.py).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ops.catalog import RULES
from ..ops.placement import R, shard_size, shard_start, way
from ..ops.strategy import replicated
from ..plans.placements import AxisSolution, kept_key
from ..profiler.graph import Segment
from ..profiler.op_view import is_op, origin, view_of
from ..profiler.signature import results
from ..profiler.slots import UPDATE, kind_of
from ..profiler.work import is_free
from .formats import arranged
from .lowerings import nll, program_of
from .redistribute import Emitter, MeshAxis, redistribute

aten = torch.ops.aten

# ops with an argument that is the size of their result: packet -> position
_OUTPUT_SIZE_ARG = {
    aten.view: 1, aten.reshape: 1, aten._unsafe_view: 1, aten.expand: 1, aten.zeros: 0, aten.ones: 0, aten.full: 0,
    aten.empty: 0, aten.new_zeros: 1, aten.new_ones: 1, aten.new_full: 1, aten.new_empty: 1, aten.slice_backward: 1,
    aten.select_backward: 1,
}  # fmt: skip
for _packet in RULES:
    if re.fullmatch(r"aten\._?upsample_\w+_backward", str(_packet)):
        _OUTPUT_SIZE_ARG[_packet] = 2
_BATCH_SIZE_ARG = {aten.native_group_norm: 3, aten.native_group_norm_backward: 5}
# counter-based ops: op name -> (position of the local size or None, position of the offset)
_RANDOM_ARGS = {
    "dropout": (None, 5),
    "rand_uniform": (1, 3),
    "rand_normal": (1, 3),
    "rand_keep": (1, 3),
    "attention": (None, 11),
    "attention_backward": (None, 14),
}

Places = tuple[int, ...]


@dataclass(frozen=True)
class ShardContext:
    """The mesh axes inside a stage, with the plan's decisions on each, in the plan's order."""

    axes: tuple[MeshAxis, ...]
    solutions: tuple[AxisSolution, ...]
    device: torch.device


def local_shape(shape: Sequence[int], places: Places, axes: Sequence[MeshAxis]) -> list[int]:
    """Sizes on this rank: each axis cuts what the axes before it left."""
    sizes = list(shape)
    for place, axis in zip(places, axes, strict=True):
        if place >= 0 and axis.size > 1:
            sizes[place] = shard_size(sizes[place], axis.size, axis.index)
    return sizes


def local_offset(shape: Sequence[int], places: Places, axes: Sequence[MeshAxis]) -> list[int]:
    """Where this rank's shard begins in the whole tensor."""
    sizes, starts = list(shape), [0] * len(shape)
    for place, axis in zip(places, axes, strict=True):
        if place >= 0 and axis.size > 1:
            starts[place] += shard_start(sizes[place], axis.size, axis.index)
            sizes[place] = shard_size(sizes[place], axis.size, axis.index)
    return starts


def whole_on_short(places: Places, axes: Sequence[MeshAxis]) -> Places:
    """The same placements: on an axis of size one everything is whole."""
    return tuple(place if axis.size > 1 else R for place, axis in zip(places, axes, strict=True))


def shard_segment(segment: Segment, context: ShardContext) -> fx.GraphModule:
    """This rank's joint graph. Placeholders and results stand in the same order as in the segment's own."""
    return _Sharding(segment, context).run()


class _Sharding:
    def __init__(self, segment: Segment, context: ShardContext) -> None:
        self.segment, self.context, self.axes = segment, context, context.axes
        self.graph = fx.Graph()
        self.emit = Emitter(self.graph)
        self.env: dict[tuple[fx.Node, int], fx.Node] = {}
        self.moved: dict[tuple[fx.Node, int, Places, Places, str], fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for node in self.segment.joint.graph.nodes:
            self.emit.phase = node.meta.get("phase", "forward")
            if node.op == "placeholder":
                new = self.graph.placeholder(node.name)
                new.meta["phase"] = self.emit.phase
                self.env[(node, 0)] = new
            elif is_op(node):
                self._op(node)
        return self._finish()

    # ----- placements

    def _made(self, source: fx.Node, output: int) -> Places:
        return tuple(s.of_result(self.segment.name, source, output) for s in self.context.solutions)

    def _strategies(self, node: fx.Node) -> list[Any]:
        name = self.segment.name
        return [
            s.strategies[(name, node.name)] if axis.size > 1 else replicated(view_of(node))
            for s, axis in zip(self.context.solutions, self.axes, strict=True)
        ]

    def _read(self, source: fx.Node, output: int, wanted: Places) -> fx.Node:
        """The operand in the placements that a reader wants, by way of the form shared by readers of this phase."""
        made, x = self._made(source, output), self.env[(source, output)]
        kept = self._kept_way(source, output)
        if self.emit.phase == "backward" and kept is not None:
            x, made = self.moved.get((source, output, *kept, "forward"), x), kept[1]
        shared = self._shared(source, output, self.emit.phase, made)
        return self._move(source, output, self._move(source, output, x, made, shared), shared, wanted)

    def _has(self, key: str) -> bool:
        return any((self.segment.name, key) in s.places for s in self.context.solutions)

    def _shared(self, source: fx.Node, output: int, phase: str, made: Places) -> Places:
        """The form that all readers of a phase go by."""
        key = (self.segment.name, f"{source.name}.{output}>{phase}")
        return tuple(s.places.get(key, place) for s, place in zip(self.context.solutions, made, strict=True))

    def _move(self, source: fx.Node, output: int, x: fx.Node, before: Places, after: Places) -> fx.Node:
        before, after = whole_on_short(before, self.axes), whole_on_short(after, self.axes)
        key = (source, output, before, after, self.emit.phase)
        if before == after:
            return x
        if key not in self.moved:
            outer = self.emit.of, self.emit.moves
            self.emit.of, self.emit.moves = source.name, True
            val = source.meta["val"]
            whole = val[output] if isinstance(val, (tuple, list)) else val
            if whole.is_complex():  # the backends move real numbers only
                x = self.emit.call(aten.view_as_real.default, self.emit.call(aten.resolve_conj.default, x))
                x = self._move_axes(x, (*whole.shape, 2), list(before), after)
                self.moved[key] = self.emit.call(aten.view_as_complex.default, self.emit.contiguous(x))
            else:
                self.moved[key] = self._move_axes(x, whole.shape, list(before), after)
            self.emit.of, self.emit.moves = outer
            if self.emit.phase == "forward" and self._kept_way(source, output) == (before, after):
                made = self.moved[key]
                while is_free(made) and made.args[0].meta.get("moves"):  # type: ignore[union-attr]
                    made = made.args[0]  # type: ignore[assignment]
                made.meta["form"] = kept_key(source.name, output)
        return self.moved[key]

    def _kept_way(self, source: fx.Node, output: int) -> tuple[Places, Places] | None:
        """From the producer's form to that, shared by the forward's readers, which the backward reads too."""
        if not self._has(kept_key(source.name, output)):
            return None
        made = self._made(source, output)
        shared = self._shared(source, output, "forward", made)
        return whole_on_short(made, self.axes), whole_on_short(shared, self.axes)

    def _move_axes(self, x: fx.Node, shape: Sequence[int], current: list[int], after: Places) -> fx.Node:
        """Along the route that the planner counted on (placement.way)."""
        steps = way(tuple(current), after)
        assert steps is not None, f"no collective leads from {current} to {after}"
        for k, place, target in steps:
            x = redistribute(self.emit, x, self._whole_on(shape, current, k), self.axes[k], place, target)
            current[k] = target
        return x

    def _whole_on(self, shape: Sequence[int], current: list[int], k: int) -> list[int]:
        return local_shape(shape, tuple(R if j == k else p for j, p in enumerate(current)), self.axes)

    # ----- ops

    def _op(self, node: fx.Node) -> None:
        self.emit.of = node.name
        strategies = self._strategies(node)
        places = iter(zip(*(s.inputs for s in strategies), strict=True)) if strategies[0].inputs else iter(())

        def operand(n: fx.Node) -> Any:
            if not isinstance(n.meta.get("val"), torch.Tensor):
                return self.env[origin(n)]
            return self._read(*origin(n), next(places))

        local_args, local_kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), operand)
        args: list[Any] = [self.context.device if isinstance(a, torch.device) else a for a in local_args]
        kwargs: dict[str, Any] = dict(local_kwargs)
        if "device" in kwargs:
            kwargs["device"] = self.context.device
        lowered = [
            (s.lowering, axis) for s, axis in zip(strategies, self.axes, strict=True) if s.lowering and axis.size > 1
        ]
        self._localize(node, args, strategies)
        if lowered:
            result = self._lower(node, args, lowered)
        else:
            args, kwargs = arranged(node, args, kwargs, self.emit.call)
            result = self.emit.call(self._target(node), *args, **kwargs)
            for key in ("stack_trace", "nn_module_stack"):
                if key in node.meta:
                    result.meta[key] = node.meta[key]
        self._store(node, result)

    def _lower(self, node: fx.Node, args: list[Any], lowered: list[tuple[str, MeshAxis]]) -> Any:
        if lowered[0][0] in ("nll_rows", "nll_cols"):
            rows = [axis for name, axis in lowered if name == "nll_rows"]
            return nll(self.emit, node, args, rows, [axis for name, axis in lowered if name == "nll_cols"])
        if len(lowered) == 2:  # tokens are sent along one axis, to experts that another one cuts besides
            (name, axis), (_, inner) = lowered
            return program_of(name)(self.emit, node, args, axis, inner)  # type: ignore[call-arg]
        ((name, axis),) = lowered
        return program_of(name)(self.emit, node, args, axis)

    def _target(self, node: fx.Node) -> Any:
        # shards come with strides of their own: a view that held for the whole tensor may need a copy
        if node.target in (aten.view.default, aten._unsafe_view.default):
            return aten.reshape.default
        return aten.squeeze.dims if node.target is aten.squeeze.default else node.target

    def _localize(self, node: fx.Node, args: list[Any], strategies: list[Any]) -> None:
        """Size and offset arguments for this rank's shard."""
        packet = getattr(node.target, "overloadpacket", None)
        out_places = tuple(s.outputs[0] for s in strategies)
        first = node.meta["val"][0] if isinstance(node.meta["val"], (tuple, list)) else node.meta["val"]
        if packet in _OUTPUT_SIZE_ARG:
            args[_OUTPUT_SIZE_ARG[packet]] = local_shape(first.shape, out_places, self.axes)
        elif packet is aten.convolution_backward and args[3] is not None:
            args[3] = local_shape(args[3], tuple(s.outputs[2] for s in strategies), self.axes)
        elif packet in _BATCH_SIZE_ARG:
            args[_BATCH_SIZE_ARG[packet]] = local_shape(first.shape, out_places, self.axes)[0]
        elif node.target is aten.squeeze.default:  # of a shard of length one, only what is one in the whole
            args.append([d for d, size in enumerate(node.args[0].meta["val"].shape) if size == 1])  # type: ignore[union-attr]
        name = getattr(node.target, "_schema", None)
        name = name.name.split("::")[1] if name is not None and name.name.startswith("shardwright::") else ""
        if name in _RANDOM_ARGS:
            local_at, offset_at = _RANDOM_ARGS[name]
            shape = args[offset_at - 1]
            if shape is None:
                return
            if name.startswith("attention"):  # scores are split as the queries are
                query = 0 if name == "attention" else 1
                out_places = tuple(s.inputs[query] if s.inputs[query] in (0, 1, 2) else R for s in strategies)
            args[offset_at] = local_offset(shape, out_places, self.axes)
            if local_at is not None:
                args[local_at] = local_shape(shape, out_places, self.axes)

    def _store(self, node: fx.Node, result: Any) -> None:
        val = node.meta["val"]
        if not isinstance(val, (tuple, list)):
            self.env[(node, 0)] = result
            return
        for k, item in enumerate(val):
            if isinstance(item, torch.Tensor):
                self.env[(node, k)] = (
                    result[k] if isinstance(result, tuple) else self.emit.call(operator.getitem, result, k)
                )

    # ----- results

    def _finish(self) -> fx.GraphModule:
        name = self.segment.name
        found: dict[str, fx.Node] = {}
        for key, (source, output), phase in results(self.segment):
            self.emit.phase = phase
            made = self._made(source, output)
            target = tuple(
                s.places.get((name, key), R if kind_of(key) == UPDATE else place)
                for s, place in zip(self.context.solutions, made, strict=True)
            )
            found[key] = self._move(source, output, self.env[(source, output)], made, target)
        self.graph.output(tuple(found.get(key) for key in self.segment.signature.results))
        self.graph.eliminate_dead_code()
        return fx.GraphModule(torch.nn.Module(), self.graph)
