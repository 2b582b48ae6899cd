"""Parameter gradients written where they are added up, instead of made first and copied there.

The gradient of a weight is mostly one matrix product, that of a table of embeddings a sum over rows. The backward then
takes, for each such slot, the memory to write it into, or to add it to: a bucket that a collective will sum, or what
earlier microbatches left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
Into = tuple[torch.Tensor, bool]  # memory of the gradient's shape, and whether something is to be added to


def write_gradients(backward: fx.Graph, num_params: int) -> tuple[int, ...]:
    """In place: one more argument, an Into or None, for each slot returned, after all others."""
    output = next(node for node in reversed(backward.nodes) if node.op == "output")
    results: Any = output.args[0]
    last = [node for node in backward.nodes if node.op == "placeholder"][-1]
    slots = []
    for slot, result in enumerate(results[:num_params]):
        if not isinstance(result, fx.Node) or list(result.users) != [output] or results.count(result) > 1:
            continue
        writer = _writer(result)
        if writer is None:
            continue
        with backward.inserting_after(last):
            last = backward.placeholder(f"into_{slot}", default_value=None)
        with backward.inserting_before(result):
            written = backward.call_function(writer, (last, *result.args))
        written.meta = dict(result.meta)
        result.replace_all_uses_with(written)
        backward.erase_node(result)
        slots.append(slot)
    return tuple(slots)


def _writer(gradient: fx.Node) -> Any:
    """What makes this gradient in memory that it is given."""
    if gradient.target is aten.mm.default:
        return product_into
    if gradient.target is aten.embedding_dense_backward.default and not gradient.args[4]:
        # on other devices the additions to a row come in no fixed order
        return rows_into if gradient.meta["val"].device.type == "cpu" else None
    return None


def product_into(into: Into | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, in the memory given where one is."""
    if into is None:
        return torch.mm(left, right)
    out, add = into
    return out.addmm_(left, right) if add else torch.mm(left, right, out=out)


def rows_into(
    into: Into | None, grad: torch.Tensor, index: torch.Tensor, num_rows: int, padding: int, by_frequency: bool
) -> torch.Tensor:
    """The gradient of an embedding table [num_rows, width], in the memory given where one is."""
    if into is None:
        return aten.embedding_dense_backward.default(grad, index, num_rows, padding, by_frequency)
    out, add = into
    if padding >= 0:
        grad = grad.masked_fill((index == padding)[..., None], 0.0)
    return (out if add else out.zero_()).index_add_(0, index.reshape(-1), grad.reshape(-1, grad.shape[-1]))
