"""Bytes that a graph run op by op holds at once, beside its own inputs."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils import _pytree as pytree


def peak_bytes(graph: fx.Graph) -> int:
    """Each storage once, from the op that makes it to the last that reads it or a view of it; results stay."""
    nodes = list(graph.nodes)
    last_use: dict[int, int] = {}
    sizes: dict[int, int] = {}
    made_at: dict[int, list[int]] = {}
    inputs: set[int] = set()
    for place, node in enumerate(nodes):
        if node.op == "placeholder":
            inputs.update(storages(node))
        elif node.op != "output":
            for key, size in storages(node).items():
                if key not in sizes and key not in inputs:
                    sizes[key] = size
                    made_at.setdefault(place, []).append(key)
        for read in (node, *node.all_input_nodes):
            for key in storages(read):
                last_use[key] = place
    freed_at: dict[int, list[int]] = {}
    for key in sizes:
        freed_at.setdefault(last_use[key], []).append(key)
    held = peak = 0
    for place in range(len(nodes)):
        held += sum(sizes[key] for key in made_at.get(place, ()))
        peak = max(peak, held)
        held -= sum(sizes[key] for key in freed_at.get(place, ()))
    return peak


def storages(node: fx.Node) -> dict[int, int]:
    """Of the tensors that a node gives: key -> bytes. Fake tensors share storages as real ones do."""
    values = pytree.tree_leaves(node.meta.get("val"))
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.layout == torch.strided]
    return {tensor.untyped_storage()._cdata: int(tensor.untyped_storage().nbytes()) for tensor in tensors}
