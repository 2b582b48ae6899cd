"""A model's captured graph beside the model itself, both in float64 and in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardwright import reference
from shardwright.kernels.ops import make_key
from shardwright.passes.formats import arranged
from shardwright.profiler.capture import capture
from shardwright.profiler.graph import ModelGraph
from shardwright.profiler.run_graph import run_graph
from shardwright.profiler.workload import Precision, Workload

WIDE = Precision(torch.float64, torch.float64, torch.float64)


def workload_of(model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> Workload:
    model = model.double()
    batch = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
    size = len(next(iter(batch.values())))
    return Workload(model, batch, size, precision=WIDE, batch_size=size, name=type(model).__name__, **options)


def largest_difference(workload: Workload, graph: ModelGraph | None = None) -> float:
    """Of the loss, every gradient and every written buffer; infinite where one side lacks a gradient."""
    graph = graph or capture(workload)
    model, batch = workload.model, workload.example_batch
    state = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    ran = run_graph(
        graph,
        state,
        batch,
        key_of=lambda base: make_key(workload.seed, 0, 0, base),
        widen=False,
        device=torch.device("cpu"),
        arranged=arranged,
    )
    loss = reference.forward_backward(workload, batch, microbatch_size=workload.batch_size)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if expected.keys() != ran.gradients.keys():
        return float("inf")
    pairs = [(ran.loss, loss), *((ran.gradients[name], expected[name]) for name in expected)]
    pairs += [(new, model.get_buffer(name)) for name, new in ran.buffers.items()]
    return max((a.to(torch.cdouble) - b.to(torch.cdouble)).abs().max().item() for a, b in pairs if a.numel())
