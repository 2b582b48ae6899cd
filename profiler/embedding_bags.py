"""Bags of embeddings as lookups and sums: tables can then lie in parts, by rows or by columns, as those of lookups do.

aten.embedding_bag makes sum, mean or maximum over each bag of rows of a table. As one op it knows no part of a table:
a row that is elsewhere has no row number here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from .expand import expand
from .nodes import value

aten = torch.ops.aten
_SUM, _MEAN, _MAX = 0, 1, 2
_BAGS = (aten.embedding_bag.padding_idx, aten.embedding_bag.default)


def replace_embedding_bag(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _BAGS:
            continue
        length = _bag_length(node)
        results = expand(graph, node, functools.partial(_bag, length=length))
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(results)
            graph.erase_node(user)  # the other results serve the backward of the op alone
        graph.erase_node(node)


def _bag_length(node: fx.Node) -> int:
    """Of bags that are all as long, as those of a matrix of indices; 0 where the data say."""
    offsets: Any = node.args[2]
    if offsets.target is not aten.arange.start_step or (len(node.args) > 7 and node.args[7]):
        return 0
    start, _, step = offsets.args[:3]
    count = value(node.args[1]).shape[0]
    return step if start == 0 and step and value(offsets).shape[0] * step == count else 0


def _bag(a: dict[str, Any], length: int) -> torch.Tensor:
    padding = a.get("padding_idx")
    padding = -1 if padding is None else padding % a["weight"].shape[0]
    rows = aten.embedding(a["weight"], a["indices"], padding, a["scale_grad_by_freq"])
    counted = (a["indices"] != padding).to(rows.dtype)[:, None] if padding >= 0 else None
    if a["per_sample_weights"] is not None:
        rows = rows * a["per_sample_weights"][:, None]
    if a["mode"] == _MAX:
        return _largest(a, rows, counted, length)
    if counted is not None:
        rows = rows * counted
    total = _summed(a, rows, length)
    if a["mode"] == _MEAN:
        number = _summed(a, counted if counted is not None else torch.ones_like(rows[:, :1]), length)
        total = total / number.clamp(min=1)
    return total


def _summed(a: dict[str, Any], rows: torch.Tensor, length: int) -> torch.Tensor:
    if length:
        return rows.reshape(-1, length, rows.shape[1]).sum(1)
    bag, count = _bags(a)
    return rows.new_zeros(count, rows.shape[1]).index_add(0, bag, rows)


def _largest(a: dict[str, Any], rows: torch.Tensor, counted: torch.Tensor | None, length: int) -> torch.Tensor:
    """Zero for a bag of nothing but padding."""
    if counted is not None:
        rows = rows.masked_fill(counted == 0, -torch.inf)
    if length:
        found = rows.reshape(-1, length, rows.shape[1]).max(1).values
    else:
        bag, count = _bags(a)
        index = bag[:, None].expand(rows.shape)
        found = rows.new_full((count, rows.shape[1]), -torch.inf).scatter_reduce(0, index, rows, "amax")
    return found.masked_fill(found == -torch.inf, 0.0)


def _bags(a: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Which bag each index is in, and the number of bags."""
    starts = a["offsets"][:-1] if a["include_last_offset"] else a["offsets"]
    place = torch.arange(a["indices"].shape[0], device=starts.device, dtype=starts.dtype)
    return torch.searchsorted(starts, place, right=True) - 1, starts.shape[0]
