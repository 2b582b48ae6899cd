"""Ops of a captured graph that the planned device has no kernel for, found before anything runs.

Capture traces on fake tensors of the CPU, so PyTorch may choose an op that only CPUs have (a fused LSTM layer), and a
user's own op may have been written for one device. Both would end the first step, on every rank, in PyTorch's words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ExitCode, ShardwrightError
from ..profiler.graph import ModelGraph
from ..profiler.nodes import source_of
from . import _torch


@dataclass(frozen=True)
class MissingKernel:
    """An op, and the user's line that it comes from ("" where the trace kept none)."""

    op: str
    source: str
    segment: str


def missing_kernels(graph: ModelGraph, device_type: str, *, of_this_build: bool) -> list[MissingKernel]:
    """In the order of the graph, each op once for each line.

    of_this_build: ask this PyTorch's dispatcher, as it is when a program is built where it will run. Otherwise, as when
    a laptop plans for GPUs, only PyTorch's own ops are judged, by the list of kernels that comes with it.
    """
    found: dict[MissingKernel, None] = {}
    known: dict[torch._ops.OpOverload, bool] = {}
    for name, segment in graph.segments.items():
        for node in segment.joint.graph.nodes:
            op = node.target
            if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload):
                continue
            if op not in known:
                known[op] = _torch.has_kernel(op, device_type, of_this_build=of_this_build)
            if not known[op]:
                found[MissingKernel(str(op), source_of(node), name)] = None
    return list(found)


def refuse_missing_kernels(graph: ModelGraph, device_type: str, *, of_this_build: bool) -> None:
    """Raises ShardwrightError, exit code 5, that names the first such op and the line it comes from."""
    missing = missing_kernels(graph, device_type, of_this_build=of_this_build)
    if not missing:
        return
    first = next((one for one in missing if one.source), missing[0])
    others = sorted({one.op for one in missing} - {first.op})
    raise ShardwrightError(
        f"{first.source or 'the model'} runs {first.op}, which has no kernel for {device_type}",
        means="the first step would end there" + (f"; so would {', '.join(others)}" if others else ""),
        change="that line of the model, or the hardware of the plan",
        works="an op that PyTorch has on both, or for an op of your own torch.library.register_kernel"
        f"('{first.op.split('.')[0]}::...', '{device_type}')",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )
