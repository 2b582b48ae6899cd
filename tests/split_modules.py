"""A module, captured, against eager PyTorch; then each of its segments on imaginary ranks, under random placements.

In float64 and one process: what one op needs to be shown right, without workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from captured import Recorded, record_instance
from one_op import assert_same
from random_placements import random_solutions
from test_passes_shard import compare, run_program
from torch import nn

from shardwright import Workload
from shardwright.profiler.capture import capture
from shardwright.profiler.graph import ModelGraph
from shardwright.profiler.workload import Precision

F64 = Precision(compute=torch.float64, master=torch.float64, grad_reduce=torch.float64)
MESHES = ({"dp": 1, "tp": 2}, {"dp": 2, "tp": 1}, {"dp": 2, "tp": 2})


def workload_of(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Workload:
    """A job whose loss is the module's result."""
    count = next(iter(batch.values())).shape[0]
    return Workload(model=model.double(), example_batch=dict(batch), global_batch=count, precision=F64)


def assert_equal_when_split(
    model: nn.Module, meshes: Sequence[dict[str, int]] = MESHES, **batch: torch.Tensor
) -> ModelGraph:
    """The module returns its loss. Raises AssertionError where the loss, a gradient or any sharded result differs."""
    workload = workload_of(model, batch)
    graph = capture(workload)
    recorded = run_model(graph, model, batch)
    for seed, sizes in enumerate(meshes):
        for one in recorded:
            found, _ = run_program(one, random_solutions(one.segment, sizes, seed), sizes, recompute=seed == 2)
            compare(one, found)
    return graph


def run_model(graph: ModelGraph, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> list[Recorded]:
    """The captured graph, forward and backward from the loss, against eager. Returns each instance as it ran."""
    tensors: dict[str, torch.Tensor] = dict(graph.constants)
    tensors |= {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    values = {f"input:{name}": tensor for name, tensor in batch.items()}
    values["input:(share)"] = torch.tensor(1.0, dtype=graph.values[graph.loss].dtype)  # all samples: one microbatch
    for instance in graph.instances:
        segment = graph.segments[instance.segment]
        ran = record_instance(segment, instance, tensors, values, {})
        values |= dict(zip(instance.outputs, ran.results, strict=False))
        values |= {f"input:{entry}": values[part] for entry, (part, _) in graph.totals.items() if part in values}
        tensors |= {
            instance.buffers[slot]: ran.results[len(segment.outputs) + k]
            for k, slot in enumerate(segment.mutated_buffers)
        }
    return _backward(graph, model, batch, values, tensors)


def _backward(
    graph: ModelGraph,
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> list[Recorded]:
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    loss = model(**batch)
    assert_same(values[graph.loss], loss.detach())
    for name, buffer in model.named_buffers():
        assert_same(after[name], buffer)
    loss.backward()
    tensors: dict[str, torch.Tensor] = {**graph.constants, **buffers}
    tensors |= {name: tensor.detach() for name, tensor in model.named_parameters()}
    tangents: dict[str, torch.Tensor] = {graph.loss: torch.ones_like(values[graph.loss])}
    gradients: dict[str, torch.Tensor] = {}
    recorded = []
    for instance in reversed(graph.instances):
        segment = graph.segments[instance.segment]
        ran = record_instance(segment, instance, tensors, values, tangents)
        recorded.append(ran)
        results = iter(ran.results[len(segment.outputs) + len(segment.mutated_buffers) :])
        for names, into in ((instance.params, gradients), (instance.inputs, tangents)):
            for name in names:
                gradient = next(results)
                if gradient is not None:
                    into[name] = into[name] + gradient if name in into else gradient
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if parameter.requires_grad:
            try:
                assert_same(gradients.get(name, torch.zeros_like(parameter)), expected)
            except AssertionError as error:
                raise AssertionError(f"gradient of {name}: {error}") from None
        parameter.grad = None
    return recorded
