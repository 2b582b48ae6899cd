"""The loss of many classes: its count of targets early, its gradient in one pass over the probabilities.

Cross entropy of N rows and C classes. The gradient by the captured ops fills an N x C matrix with zeros, writes one
entry in each row, and makes a third such matrix of it and of the log-probabilities. Here a few rows at a time are, so
that they stay in the cache, and the result goes where the log-probabilities were: bit for bit the same numbers.

The weight that the sum is divided by is the number of targets that count, which needs no probabilities: a rank can ask
the others for theirs long before it has its own loss.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..ops.in_place import LOSS_CHUNK_BYTES
from .tidy import call, replace

aten = torch.ops.aten
_SUM, _MEAN = 2, 1


def early_count(graph: fx.Graph) -> None:
    """In place: the total weight of an unweighted loss as the count of its targets, at the top of the graph."""
    for node in list(graph.nodes):
        if node.target is not aten.nll_loss_forward.default or node.args[2] is not None:
            continue
        target: Any = node.args[1]
        for item in [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]:
            if node.args[3] != _SUM or target.op != "placeholder":
                continue
            with graph.inserting_before(next(n for n in graph.nodes if n.op == "call_function")):
                counts = call(graph, aten.ne.Scalar, target, node.args[4])
                total = call(graph, aten.sum.default, counts)
                replace(item, call(graph, aten._to_copy.default, total, dtype=item.meta["val"].dtype))


def fuse_cross_entropy_backward(graph: fx.Graph) -> None:
    """In place: nll_loss_backward and the softmax's derivative behind it become one function."""
    for node in list(graph.nodes):
        if node.target is not aten._log_softmax_backward_data.default:
            continue
        inner, logs, dim, dtype = node.args
        if (
            not isinstance(inner, fx.Node)
            or inner.target is not aten.nll_loss_backward.default
            or len(inner.users) > 1
            or inner.args[1] is not logs
            or inner.args[3] is not None
            or inner.args[4] not in (_SUM, _MEAN)
            or logs.meta["val"].dim() != 2  # type: ignore[union-attr]
            or dim not in (1, -1)
        ):
            continue
        grad, _, target, _, reduction, ignore, total = inner.args
        with graph.inserting_before(node):
            weight = total if reduction == _MEAN else None
            new = graph.call_function(cross_entropy_backward, (grad, logs, target, ignore, weight, dtype))
            new.meta["val"] = node.meta["val"]
            replace(node, new)
    graph.eliminate_dead_code()


def cross_entropy_backward(
    grad: torch.Tensor,
    logs: torch.Tensor,
    target: torch.Tensor,
    ignore: int,
    total: torch.Tensor | None,
    dtype: torch.dtype,
    overwrite: bool = False,
) -> torch.Tensor:
    """Gradient of the logits [N, C] from log-probabilities [N, C], targets [N] and the scalar gradient of the loss.

    total: what the sum of losses was divided by, None: nothing. overwrite: the result takes the memory of logs.
    """
    rows = grad if total is None else grad / total
    counts = target != ignore
    rows = torch.where(counts, -rows, 0.0).to(logs.dtype)[:, None]
    target = torch.where(counts, target, 0)[:, None]
    out = logs if overwrite else torch.empty_like(logs, dtype=dtype)
    step = max(1, logs.shape[0])
    if logs.device.type == "cpu":  # elsewhere a launch costs more than the cache spares
        step = min(step, max(1, LOSS_CHUNK_BYTES // max(1, logs.shape[1] * logs.element_size())))
    given = logs.new_zeros(step, logs.shape[1])  # the gradient of some rows: zero but for one entry in each
    for start in range(0, logs.shape[0], step):
        part = slice(start, start + step)
        some = given[: min(step, logs.shape[0] - start)]
        some.scatter_(1, target[part], rows[part])
        aten._log_softmax_backward_data.out(some, logs[part], 1, dtype, out=out[part])
        some.scatter_(1, target[part], 0.0)
    return out
