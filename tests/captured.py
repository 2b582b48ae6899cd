"""Captured presets in float64 with real values in every node, shared by the tests of sharding and passes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from shardwright.kernels.ops import make_key
from shardwright.passes.formats import arranged
from shardwright.profiler.batches import make_batch, resize_batch
from shardwright.profiler.capture import capture
from shardwright.profiler.graph import ModelGraph, Segment, SegmentInstance
from shardwright.profiler.initial_values import materialize
from shardwright.profiler.models import load_workload, make_reference_dtype
from shardwright.profiler.op_view import is_op
from shardwright.profiler.workload import Workload

PRESETS = ("tiny-gpt2", "tiny-llama", "tiny-bert", "tiny-t5", "tiny-vit", "mlp", "tiny-unet", "tiny-mixtral")


@functools.cache
def workload_of(preset: str, batch: int = 6) -> Workload:
    loaded = load_workload(f"preset:{preset}", global_batch=batch, batch_size=batch)
    return make_reference_dtype(resize_batch(loaded, batch))


@functools.cache
def graph_of(preset: str, batch: int = 6) -> ModelGraph:
    return capture(workload_of(preset, batch))


# real kernels lay some results otherwise than fake ones: a view that held in the trace may need a copy
_OP: dict[Any, Any] = {torch.ops.aten.view.default: torch.ops.aten.reshape.default}


@dataclass(frozen=True)
class Recorded:
    """One distinct segment with the value of each node of its joint graph."""

    segment: Segment
    values: dict[fx.Node, Any]

    @property
    def placeholders(self) -> dict[fx.Node, Any]:
        return {n: self.values[n] for n in self.segment.joint.graph.nodes if n.op == "placeholder"}

    @property
    def results(self) -> tuple[Any, ...]:
        output = next(n for n in reversed(self.segment.joint.graph.nodes) if n.op == "output")
        return fx.node.map_arg(output.args[0], lambda n: self.values[n])


@functools.cache
def recorded(preset: str, batch: int = 6) -> tuple[Recorded, ...]:
    """The model run once on random parameters (none zero or one, so that nothing hides) and random tangents."""
    return record(workload_of(preset, batch), graph_of(preset, batch), batch)


def record(workload: Workload, graph: ModelGraph, batch: int) -> tuple[Recorded, ...]:
    model = materialize(workload).model
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = dict(graph.constants)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        noise = torch.randn(tensor.shape, dtype=torch.float64, generator=generator) * 0.3
        tensors[name] = (tensor.detach() + noise.abs()).to(tensor.dtype) if tensor.is_floating_point() else tensor
    values = {f"input:{name}": tensor for name, tensor in make_batch(workload, batch, seed=3).items()}
    values["input:(share)"] = torch.tensor(1.0, dtype=torch.float64)  # all samples: one microbatch
    found: dict[str, Recorded] = {}

    def random_tangent(val: torch.Tensor) -> torch.Tensor:
        return torch.randn(val.shape, dtype=val.dtype, generator=generator)

    for instance in graph.instances:
        segment = graph.segments[instance.segment]
        ran = _run(segment, instance, tensors, values, random_tangent)
        values |= dict(zip(instance.outputs, ran.results, strict=False))
        values |= {f"input:{entry}": values[part] for entry, (part, _) in graph.totals.items() if part in values}
        found.setdefault(segment.name, ran)
    return tuple(found.values())


def record_instance(
    segment: Segment,
    instance: SegmentInstance,
    tensors: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    tangents: dict[str, torch.Tensor],
) -> Recorded:
    """An instance run with these tangents by name of the value; those not given are zero."""
    names = iter(name for name, info in zip(instance.outputs, segment.outputs, strict=True) if info.requires_grad)
    return _run(
        segment,
        instance,
        tensors,
        values,
        lambda val: tangents.get(next(names), torch.zeros(val.shape, dtype=val.dtype)),
    )


def _run(
    segment: Segment,
    instance: SegmentInstance,
    tensors: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    tangent: Callable[[torch.Tensor], torch.Tensor],
) -> Recorded:
    given = [tensors[n] for n in (*instance.params, *instance.buffers)] + [values[n] for n in instance.inputs]
    arguments = iter([*given, make_key(3, 1, 1, instance.random_base)])
    env: dict[fx.Node, Any] = {}
    for node in segment.joint.graph.nodes:
        if node.op == "placeholder" and node.name.startswith("tangent_"):
            env[node] = tangent(node.meta["val"])
        elif node.op == "placeholder":
            env[node] = next(arguments)
            assert tuple(env[node].shape) == tuple(node.meta["val"].shape), node.name
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg(_arranged(node, env), lambda n: env[n])
            env[node] = (
                args[0][args[1]]
                if node.target is operator.getitem
                else _OP.get(node.target, node.target)(*args, **kwargs)
            )
    return Recorded(segment, env)


def _arranged(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """Arguments of a node, those whose format its kernel assumes as tensors, others as nodes."""

    def call(op: Any, *args: Any) -> Any:
        return op(*(env[a] if isinstance(a, fx.Node) else a for a in args))

    return arranged(node, list(node.args), dict(node.kwargs), call) if is_op(node) else (node.args, node.kwargs)
