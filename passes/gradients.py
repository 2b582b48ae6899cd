"""Parameter gradients written where they are added up, instead of made first and copied there.

A weight's gradient is mostly one matrix product. Its backward then takes, for each such slot, the memory to write it
into, or to add it to: a bucket that a collective will sum, or what earlier microbatches left.
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
    slots = tuple(
        slot
        for slot, result in enumerate(results[:num_params])
        if isinstance(result, fx.Node) and result.target is aten.mm.default and list(result.users) == [output]
        and results.count(result) == 1
    )  # fmt: skip
    last = [node for node in backward.nodes if node.op == "placeholder"][-1]
    for slot in slots:
        product = results[slot]
        with backward.inserting_after(last):
            last = backward.placeholder(f"into_{slot}", default_value=None)
        with backward.inserting_before(product):
            written = backward.call_function(product_into, (last, *product.args))
        written.meta = dict(product.meta)
        product.replace_all_uses_with(written)
        backward.erase_node(product)
    return slots


def product_into(into: Into | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, in the memory given where one is."""
    if into is None:
        return torch.mm(left, right)
    out, add = into
    return out.addmm_(left, right) if add else torch.mm(left, right, out=out)
