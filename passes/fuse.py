"""Fusing passes over the forward graphs of a captured model, each distinct segment once."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Collection

import torch
from torch import fx

from ..profiler.graph import ModelGraph
from ..profiler.joint import retrace
from .fuse_gelu import fuse_gelu
from .fuse_loss import Asked, fuse_linear_losses
from .fuse_norm import Wins, fuse_add_rms_norm

_OF_NORMS = ", of norms "
FUSED_OPS = ("shardwright::add_rms_norm", "shardwright::rms_norm")
_LOSS = "chunked_loss"


def fuse_model(
    graph: ModelGraph,
    wins: Callable[[torch.dtype], Wins],
    only: Collection[str] | None = None,
    chunks_loss: Asked | None = None,
) -> tuple[ModelGraph, list[str]]:
    """The model with kernels fused where they win, and what was fused, as 'segment3: add_rms_norm x2'; where norms were
    left, 'segment3: add_rms_norm x2, of norms 0, 2'.

    wins(dtype) answers for norms on operands of that dtype; a fused GELU does less of everything. chunks_loss:
    answers for losses of a linear layer's rows; None: none is taken some rows at a time. only: what this gave before,
    for another size of the batch: the same are fused. A segment in which nothing is fused is kept as it is.
    """
    chosen = None if only is None else dict(map(_read_fusion, only))
    segments, done = dict(graph.segments), []
    for name, segment in graph.segments.items():
        if chosen is not None and name not in chosen:
            continue
        dtype = next(
            (info.dtype for info in (*segment.inputs, *segment.outputs) if info.dtype.is_floating_point), torch.float32
        )
        answers: list[bool] = []
        judge = _recorded(wins(dtype) if chosen is None else _as_before(chosen[name]), answers)
        fused = fuse_add_rms_norm(segment.forward, (), wins=judge)
        counts = _fused_ops(fused.graph)
        gelus = fuse_gelu(fused.graph)
        if gelus:
            counts["gelu"] = gelus
        asked = chunks_loss if chosen is None else _loss_as_before(name, only or ())
        losses = fuse_linear_losses(fused.graph, asked) if asked is not None else 0
        if losses:
            counts[_LOSS] = losses
        if gelus or losses:
            fused.recompile()
        if counts:
            segments[name] = retrace(segment, fused)
            text = ", ".join(f"{op} x{count}" for op, count in sorted(counts.items()))
            fused_norms = ", ".join(str(number) for number, won in enumerate(answers) if won)
            done.append(f"{name}: {text}" + ("" if all(answers) else f"{_OF_NORMS}{fused_norms}"))
    return (dataclasses.replace(graph, segments=segments) if done else graph), done


def _recorded(wins: Wins, answers: list[bool]) -> Wins:
    def judge(flops: int, bytes_saved: int) -> bool:
        answers.append(wins(flops, bytes_saved))
        return answers[-1]

    return judge


def _read_fusion(text: str) -> tuple[str, frozenset[int] | None]:
    """Segment, and the numbers of the norms that were fused; None: all."""
    name, _, numbers = text.partition(_OF_NORMS)
    found = frozenset(int(number) for number in numbers.split(",") if number.strip()) if _OF_NORMS in text else None
    return name.split(":")[0], found


def _loss_as_before(segment: str, texts: Collection[str]) -> Asked | None:
    """All losses of a segment are alike in that, or none."""
    chosen = any(text.split(":")[0] == segment and f" {_LOSS} x" in text for text in texts)
    return (lambda rows, classes, itemsize: True) if chosen else None


def _as_before(numbers: frozenset[int] | None) -> Wins:
    count = itertools.count()
    return lambda flops, bytes_saved: numbers is None or next(count) in numbers


def _fused_ops(graph: fx.Graph) -> Counter[str]:
    names = [getattr(getattr(n.target, "_schema", None), "name", "") for n in graph.nodes if n.op == "call_function"]
    return Counter(name.split("::")[1] for name in names if name in FUSED_OPS)
