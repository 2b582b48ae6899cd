"""A joint graph without writes and without as_strided: what the sharding pass can cut.

Some of autograd's formulas fill memory that they then see under another name (those of as_strided, of the real Fourier
transforms, of cumulative products); some of torch's own composites write to slices of an empty tensor (circular
padding). One more trace, through functionalization, gives each its new value; as_strided, which addresses memory and
not elements, becomes a lookup by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import ExitCode, ShardwrightError
from . import _torch

aten = torch.ops.aten
_STRIDED = (aten.as_strided.default, aten.as_strided_.default)


def writes_or_restrides(graph: fx.Graph) -> bool:
    return any(
        node.target in _STRIDED or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)
        for node in graph.nodes
    )


def without_writes(traced: fx.GraphModule, args: Sequence[Any], last: str) -> tuple[fx.GraphModule, list[str]]:
    """last: the node that ends the forward. Returns the new graph and that node's name in it, as a list of one."""
    boundary = [""]

    class Marking(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name == last:
                boundary[0] = _torch.last_traced_node_name()
            return result

    def run(*flat: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return Marking(traced).run(*flat)

    with torch.no_grad():
        functional = torch.func.functionalize(run, remove="mutations")
        return make_fx(functional, decomposition_table=_TABLE, tracing_mode="real")(*args), boundary


def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return source.to(target.dtype).expand(target.shape)


def _as_strided(
    x: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> torch.Tensor:
    flat, index = _addressed(x, size, stride, storage_offset)
    return flat if index is None else flat[index]


def _as_strided_scatter(
    x: torch.Tensor, source: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> torch.Tensor:
    flat, index = _addressed(x, size, stride, storage_offset)
    if index is None:
        return source
    filled = aten.index_put(flat, [index], source)
    order = _order(x)
    back = [order.index(dim) for dim in range(x.dim())]
    return filled.reshape([x.shape[dim] for dim in order]).permute(back)


def _addressed(
    x: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x as it lies in memory, in one dimension, and where each element asked for stands; (x, None) where that is x."""
    start = x.storage_offset() if storage_offset is None else storage_offset
    if (tuple(size), tuple(stride), start) == (tuple(x.shape), x.stride(), x.storage_offset()):
        return x, None
    order = _order(x)
    start -= x.storage_offset()
    reach = start + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if not _dense(x, order) or start < 0 or (0 not in size and reach >= x.numel()):
        raise ShardwrightError(
            f"as_strided reads memory beside the tensor {tuple(x.shape)} that it is called on",
            means="only elements of the tensor itself can be followed in a graph",
            change="the line that calls as_strided: call it on the whole tensor",
            works="x.contiguous().as_strided(...), or unfold, reshape and indexing in its place",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )
    index = torch.full([1] * len(size), int(start), dtype=torch.int64, device=x.device)
    for dim, (n, s) in enumerate(zip(size, stride, strict=True)):
        steps = torch.arange(n, dtype=torch.int64, device=x.device) * s
        index = index + steps.reshape([n if d == dim else 1 for d in range(len(size))])
    return x.permute(order).reshape(-1), index


def _order(x: torch.Tensor) -> list[int]:
    return sorted(range(x.dim()), key=lambda dim: (-x.stride()[dim], dim))


def _dense(x: torch.Tensor, order: list[int]) -> bool:
    reach = 1
    for dim in reversed(order):
        if x.shape[dim] > 1:
            if x.stride(dim) != reach:
                return False
            reach *= x.shape[dim]
    return True


_TABLE: dict[Any, Any] = {
    aten.copy.default: copy,
    aten.as_strided.default: _as_strided,
    aten.as_strided_scatter.default: _as_strided_scatter,
}
