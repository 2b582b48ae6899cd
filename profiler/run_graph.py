"""A captured graph run as it is, op by op, in one process: no plan, no passes, no process group.

What planning and rewriting start from can so be held against the model that it was captured from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .global_loss import SHARE
from .graph import ModelGraph, Segment, SegmentInstance
from .joint import flatten_outputs
from .slots import TANGENT, kind_of

Tensors = Mapping[str, torch.Tensor]
_ANY_STRIDES = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}
# (node, its args, its kwargs, what calls a function of nodes) -> (args, kwargs)
Arranged = Callable[[fx.Node, list[Any], dict[str, Any], Callable[..., Any]], Any]
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ran:
    """Gradients by parameter, where the graph gives one; buffers are the new values of those that it writes."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


@torch.no_grad()
def run_graph(
    graph: ModelGraph,
    state: Tensors,
    batch: Tensors,
    *,
    key_of: Callable[[int], torch.Tensor],
    widen: bool,
    device: torch.device,
    arranged: Arranged | None = None,
) -> Ran:
    """state: parameters and buffers by name. key_of: the random key after so many random ops. widen: every narrower
    floating dtype that the graph names is float64. arranged: brings operands to the formats that kernels read, as
    tensors have other strides than the trace saw."""
    wide = (lambda t: t.double() if t.dtype in _NARROW else t) if widen else (lambda t: t)
    constants = {name: wide(tensor).to(device) for name, tensor in graph.constants.items()}
    known = {**constants, **{name: wide(tensor.detach()) for name, tensor in state.items()}}
    values = {f"input:{name}": wide(tensor).to(device) for name, tensor in batch.items()}
    dtype = torch.float64 if widen else graph.values[graph.loss].dtype
    values[f"input:{SHARE}"] = torch.ones((), dtype=dtype, device=device)  # the batch is one microbatch
    settle = _settled(widen, device)
    updates: dict[str, torch.Tensor] = {}
    running = []
    for instance in graph.instances:
        segment = graph.segments[instance.segment]
        key = key_of(instance.random_base).to(device)
        arguments = [known[n] for n in (*instance.params, *instance.buffers)] + [values[n] for n in instance.inputs]
        ran = _Running(segment, instance, [*arguments, key], settle, arranged)
        results = ran.forward()
        values |= dict(zip(instance.outputs, results, strict=False))
        values |= {f"input:{entry}": values[part] for entry, (part, _) in graph.totals.items() if part in values}
        for slot, new in zip(segment.mutated_buffers, results[len(instance.outputs) :], strict=True):
            updates[instance.buffers[slot]] = new
        running.append(ran)
    gradients: dict[str, torch.Tensor] = {}
    arriving = {graph.loss: torch.ones_like(values[graph.loss])}
    for ran in reversed(running):
        for name, gradient in ran.backward(arriving, values):
            held = gradients if name in graph.params else arriving
            held[name] = held[name] + gradient if name in held else gradient
    return Ran(values[graph.loss], gradients, updates)


class _Running:
    """One instance between its forward and its backward."""

    def __init__(
        self,
        segment: Segment,
        instance: SegmentInstance,
        arguments: list[Any],
        settle: Callable[[Any], Any],
        arranged: Arranged | None,
    ) -> None:
        self.segment, self.instance, self.settle, self.arranged = segment, instance, settle, arranged
        given = iter(arguments)
        self.env: dict[fx.Node, Any] = {}
        self.tangents: list[fx.Node] = []
        for node in segment.joint.graph.nodes:
            if node.op == "placeholder" and kind_of(node.name) == TANGENT:
                self.tangents.append(node)
            elif node.op == "placeholder":
                self.env[node] = next(given)
        self.results = flatten_outputs(segment.joint.graph)

    def forward(self) -> list[torch.Tensor]:
        self._run("forward")
        end = len(self.segment.outputs) + len(self.segment.mutated_buffers)
        return [self.env[node] for node in self.results[:end]]

    def backward(self, arriving: Tensors, values: Tensors) -> list[tuple[str, torch.Tensor]]:
        """(parameter or value, its gradient) from the gradients of the outputs."""
        taking = [
            name for name, info in zip(self.instance.outputs, self.segment.outputs, strict=True) if info.requires_grad
        ]
        if not any(name in arriving for name in taking):
            return []
        for node, name in zip(self.tangents, taking, strict=True):
            self.env[node] = arriving[name] if name in arriving else torch.zeros_like(values[name])
        self._run("backward")
        end = len(self.segment.outputs) + len(self.segment.mutated_buffers)
        names = (*self.instance.params, *self.instance.inputs)
        given = zip(names, self.results[end:], strict=True)
        return [(name, self.env[node]) for name, node in given if isinstance(node, fx.Node)]

    def _run(self, phase: str) -> None:
        for node in self.segment.joint.graph.nodes:
            if node.meta.get("phase", "forward") != phase or node in self.env:
                continue
            if node.op == "get_attr":
                self.env[node] = self.settle(getattr(self.segment.joint, str(node.target)))
            elif node.op == "call_function":
                given: Any = (node.args, node.kwargs)
                if self.arranged is not None:
                    given = self.arranged(node, list(node.args), dict(node.kwargs), self._call)
                args, kwargs = fx.node.map_arg(given, self.env.__getitem__)
                if node.target is operator.getitem:
                    self.env[node] = args[0][args[1]]
                else:
                    args, kwargs = fx.node.map_aggregate((args, kwargs), self.settle)
                    target = _ANY_STRIDES.get(node.target, node.target)  # kernels may choose others than the trace saw
                    self.env[node] = target(*args, **kwargs)  # type: ignore[operator]

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*(self.env[a] if isinstance(a, fx.Node) else a for a in args))


def _settled(widen: bool, device: torch.device) -> Callable[[Any], Any]:
    """Arguments of an op, for this device and width: graphs are captured for CPUs, in the model's own dtype."""

    def settle(argument: Any) -> Any:
        if isinstance(argument, torch.device):
            return device
        if widen and isinstance(argument, torch.dtype) and argument in _NARROW:
            return torch.float64
        return argument

    return settle
