"""Sharding rules of lookups and their gradients, convolution and pooling."""

from __future__ import annotations

import re

from ..profiler.op_view import OpView
from .placement import P, R
from .rules import aten, rule_for, same_everywhere, wrap
from .strategy import Strategy

# --------------------------------------------------------------------------- lookups


@rule_for("embedding")
def embedding(view: OpView) -> list[Strategy]:
    _, index = view.inputs
    found = [Strategy((R, d), (d,)) for d in range(index.dim())]
    found.append(Strategy((1, R), (index.dim(),)))
    found.append(Strategy((0, R), (P,), lowering="embedding_rows"))
    return found


@rule_for("embedding_dense_backward")
def embedding_backward(view: OpView) -> list[Strategy]:
    """(grad, indices, num_weights, padding_idx, scale_grad_by_freq)"""
    grad, index = view.inputs
    if view.args[4]:
        return [Strategy((grad.dim() - 1, R), (1,))]
    found = [Strategy((d, d), (P,)) for d in range(index.dim())]
    found += [Strategy((grad.dim() - 1, R), (1,)), Strategy((P, R), (P,))]
    found.append(Strategy((R, R), (0,), lowering="embedding_rows_backward"))
    return found


@rule_for("gather")
def gather(view: OpView) -> list[Strategy]:
    source, index = view.inputs
    dim = wrap(view.args[1], max(source.dim(), 1))
    return [Strategy((d, d), (d,)) for d in range(source.dim()) if d != dim and source.shape[d] == index.shape[d]] + [
        Strategy((P, R), (P,))
    ]


@rule_for("scatter", "scatter_add")
def scatter(view: OpView) -> list[Strategy]:
    source = view.inputs[0]
    dim = wrap(view.args[1], max(source.dim(), 1))
    same = [d for d in range(source.dim()) if d != dim and all(t.shape[d] == source.shape[d] for t in view.inputs)]
    return same_everywhere(view, same)


@rule_for("scatter_reduce")
def scatter_reduce(view: OpView) -> list[Strategy]:
    return list(scatter(view))


@rule_for("index_add", "index_copy", "index_reduce")
def index_add(view: OpView) -> list[Strategy]:
    """(x, dim, index, source): other dimensions; of a sum, also the rows of the source, each adding on its rank."""
    x, _, source = view.inputs
    dim = wrap(view.args[1], max(x.dim(), 1))
    found = [Strategy((d, R, d), (d,)) for d in range(x.dim()) if d != dim]
    if view.op.overloadpacket is aten.index_add:
        found.append(Strategy((P, R, P), (P,)))
        if source.dim() == x.dim() and x.dim() > 0:
            found.append(Strategy((P, 0, dim), (P,)))
    return found


@rule_for("index")
def index(view: OpView) -> list[Strategy]:
    """x[i, j, ...] with index tensors: dimensions that are not indexed, and those of the indices."""
    source, out = view.inputs[0], view.outputs[0]
    assert out is not None
    indices = view.args[1]
    used = [d for d, i in enumerate(indices) if i is not None]
    others = (R,) * (len(view.inputs) - 1)
    broadcast = max(t.dim() for t in view.inputs[1:])
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    found = [Strategy((P, *others), (P,))]
    for d in range(source.dim()):
        if d in used:
            continue
        before = sum(1 for u in range(d) if u not in used)
        found.append(Strategy((d, *others), (before + (broadcast if before >= at else 0),)))
    for k in range(broadcast):  # split the index itself
        size = out.shape[at + k]
        places = []
        for t in view.inputs[1:]:
            own = k - (broadcast - t.dim())
            places.append(own if own >= 0 and t.shape[own] == size else R)
        if size > 1:
            found.append(Strategy((R, *places), (at + k,)))
    return found


@rule_for("index_select")
def index_select(view: OpView) -> list[Strategy]:
    source = view.inputs[0]
    dim = wrap(view.args[1], source.dim())
    return [Strategy((d, R), (d,)) for d in range(source.dim()) if d != dim] + [
        Strategy((R, 0), (dim,)), Strategy((P, R), (P,))
    ]  # fmt: skip


@rule_for("index_put", "_unsafe_index_put")
def index_put(view: OpView) -> list[Strategy]:
    """zeros.index_put([i], grad, accumulate=True): the backward of a lookup."""
    source = view.inputs[0]
    indices = view.args[1]
    used = [d for d, i in enumerate(indices) if i is not None]
    count = len(view.inputs) - 2
    values = view.inputs[-1]
    found = []
    if used == list(range(len(used))):
        broadcast = max(t.dim() for t in view.inputs[1:-1])
        for d in range(len(used), source.dim()):
            if values.dim() == broadcast + source.dim() - len(used):
                found.append(Strategy((d, *(R,) * count, d - len(used) + broadcast), (d,)))
    if view.arg(3, "accumulate", False):
        found.append(Strategy((P, *(R,) * count, P), (P,)))
        if all(t.dim() == view.inputs[1].dim() for t in view.inputs[1:-1]):
            for k in range(view.inputs[1].dim()):
                if values.dim() > k and used == list(range(len(used))):
                    if all(t.shape[k] == values.shape[k] for t in view.inputs[1:-1]):
                        found.append(Strategy((P, *(k,) * count, k), (P,)))
    return found


# --------------------------------------------------------------------------- convolution and pooling


@rule_for("convolution")
def convolution(view: OpView) -> list[Strategy]:
    """(input, weight, bias?, stride, padding, dilation, transposed, output_padding, groups)"""
    transposed, groups = view.args[6], view.args[8]
    bias = len(view.inputs) == 3
    tail = lambda place: (place,) if bias else ()  # noqa: E731
    found = [Strategy((0, R, *tail(R)), (0,))]
    if groups == 1:
        out_dim, in_dim = (1, 0) if transposed else (0, 1)
        found.append(Strategy((R, out_dim, *tail(0)), (1,)))
        found.append(Strategy((1, in_dim, *tail(P)), (P,)))
    return found


@rule_for("convolution_backward")
def convolution_backward(view: OpView) -> list[Strategy]:
    """(grad, input, weight, bias_sizes, ...) -> (grad_input, grad_weight, grad_bias)"""
    transposed, groups = view.args[7], view.args[9]
    found = [Strategy((0, 0, R), (0, P, P))]
    if groups == 1:
        out_dim, in_dim = (1, 0) if transposed else (0, 1)
        found.append(Strategy((1, R, out_dim), (P, out_dim, 0)))
        found.append(Strategy((R, 1, in_dim), (1, in_dim, R)))
    return found


_SPATIAL = (
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
    "max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "adaptive_max_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d",
)  # fmt: skip


@rule_for("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im", *_SPATIAL)
@rule_for(*(f"{name}_backward" for name in _SPATIAL))
def spatial(view: OpView) -> list[Strategy]:
    """Works on each image and channel alone; what moves pixels into channels, on each image."""
    name = view.op._schema.name.split("::")[1]
    moves = name in ("pixel_shuffle", "pixel_unshuffle")
    columns = name in ("im2col", "col2im")
    batched = 3 if name == "col2im" else 4 if moves or columns else 2 + int(re.search(r"(\d)d", name).group(1))  # type: ignore[union-attr]
    if view.inputs[0].dim() < batched:
        return []
    return same_everywhere(view, [0] if moves or columns else [0, 1])
