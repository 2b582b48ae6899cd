"""Fusing passes over the forward graphs of a captured model, each distinct segment once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection

import torch
from torch import fx

from ..profiler.graph import ModelGraph
from ..profiler.joint import retrace
from .fuse_gelu import fuse_gelu
from .fuse_norm import Wins, fuse_add_rms_norm

FUSED_OPS = ("shardwright::add_rms_norm", "shardwright::rms_norm")


def fuse_model(
    graph: ModelGraph, wins: Callable[[torch.dtype], Wins], only: Collection[str] | None = None
) -> tuple[ModelGraph, list[str]]:
    """The model with kernels fused where they win, and what was fused, as 'segment3: add_rms_norm x2'.

    wins(dtype) answers for norms on operands of that dtype; a fused GELU does less of everything. only: the segments
    to look at. A segment in which nothing is fused is kept as it is.
    """
    segments, done = dict(graph.segments), []
    for name, segment in graph.segments.items():
        if only is not None and name not in only:
            continue
        dtype = next(
            (info.dtype for info in (*segment.inputs, *segment.outputs) if info.dtype.is_floating_point), torch.float32
        )
        fused = fuse_add_rms_norm(segment.forward, (), wins=wins(dtype))
        counts = _fused_ops(fused.graph)
        gelus = fuse_gelu(fused.graph)
        if gelus:
            counts["gelu"] = gelus
            fused.recompile()
        if counts:
            segments[name] = retrace(segment, fused)
            done.append(f"{name}: " + ", ".join(f"{op} x{count}" for op, count in sorted(counts.items())))
    return (dataclasses.replace(graph, segments=segments) if done else graph), done


def _fused_ops(graph: fx.Graph) -> Counter[str]:
    names = [getattr(getattr(n.target, "_schema", None), "name", "") for n in graph.nodes if n.op == "call_function"]
    return Counter(name.split("::")[1] for name in names if name in FUSED_OPS)
