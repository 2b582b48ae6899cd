"""Sharding rules of aten ops on one mesh axis: for each op, all the ways in which ranks can share its work.

A rule sees an OpView and yields strategies; the all-replicated one is added for every op. RULES maps each op (all
overloads) to its rule; ops tagged pointwise need no entry. Ops without a rule here are looked up in DTensor's own
rules (dtensor_rules.py), then planned replicated and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .placement import P, R
from .strategy import OpView, Strategy
from .views import reshape_pairs

aten = torch.ops.aten
Rule = Callable[[OpView], Iterable[Strategy]]
RULES: dict[Any, Rule] = {}


def rule_for(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[getattr(aten, name)] = rule
        return rule

    return register


def find_rule(op: Any) -> Rule | None:
    if not isinstance(op, torch._ops.OpOverload):
        return None
    if op.overloadpacket in RULES:
        return RULES[op.overloadpacket]
    if torch.Tag.pointwise in op.tags and not op._schema.is_mutable:
        return pointwise
    return None


def same_everywhere(view: OpView, dims: Iterable[int]) -> list[Strategy]:
    """Every tensor operand and result split on the same dimension."""
    return [Strategy((d,) * len(view.inputs), (d,) * len(view.outputs)) for d in dims]


def wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


# --------------------------------------------------------------------------- pointwise
# ops through which a partial sum passes: linear in the operands listed (positions among tensor operands), others whole
_LINEAR_UNARY = {
    "neg",
    "clone",
    "_to_copy",
    "alias",
    "detach",
    "mul.Scalar",
    "div.Scalar",
    "contiguous",
    "real",
    "imag",
}
_LINEAR_FIRST = {"silu_backward", "gelu_backward", "threshold_backward", "tanh_backward", "sigmoid_backward",
                 "native_dropout_backward", "hardtanh_backward", "leaky_relu_backward", "elu_backward",
                 "hardswish_backward", "softplus_backward", "div"}  # fmt: skip


def pointwise(view: OpView) -> list[Strategy]:
    """Any output dimension; operands that are broadcast along it stay whole. Partial sums through linear ops."""
    out = next(o for o in view.outputs if o is not None)
    rank = out.dim()
    found = []
    for d in range(rank):
        places = []
        for t in view.inputs:
            own = d - (rank - t.dim())
            places.append(own if own >= 0 and t.shape[own] == out.shape[d] and out.shape[d] > 1 else R)
        if out.shape[d] > 1:
            found.append(Strategy(tuple(places), (d,) * len(view.outputs)))
    name = view.op._schema.name.split("::")[1]
    full = f"{name}.{view.op._overloadname}"
    count = len(view.inputs)
    if not out.is_floating_point():
        return found
    widening = all(t.is_floating_point() and t.dtype.itemsize <= out.dtype.itemsize for t in view.inputs)
    if count == 1 and widening and (name in _LINEAR_UNARY or full in _LINEAR_UNARY or _by_number(view, name)):
        found.append(Strategy((P,), (P,)))
    elif count == 2 and name in ("add", "sub"):
        found.append(Strategy((P, P), (P,)))
    elif count == 2 and name == "mul":
        found += [Strategy((P, R), (P,)), Strategy((R, P), (P,))]
    elif count >= 2 and name in _LINEAR_FIRST and not view.kwargs.get("rounding_mode"):
        found.append(Strategy((P,) + (R,) * (count - 1), (P,)))
    elif name == "where" and count == 3:
        found.append(Strategy((R, P, P), (P,)))
    return found


RULES[aten._to_copy] = pointwise  # not tagged so in every torch; DTensor's rule would round the parts of a sum


def _by_number(view: OpView, name: str) -> bool:
    """x * 2 and x / 2 are linear; 2 / x is not."""
    if name == "mul":
        return True
    return name == "div" and isinstance(view.args[0], torch.fx.Node) and not view.kwargs.get("rounding_mode")


# --------------------------------------------------------------------------- views


@rule_for("view", "reshape", "_unsafe_view")
def reshape(view: OpView) -> list[Strategy]:
    found = [Strategy((P,), (P,))]
    for i, j, exact in reshape_pairs(view.inputs[0].shape, view.outputs[0].shape):  # type: ignore[union-attr]
        found.append(Strategy((i,), (j,), even=not exact))
    return found


@rule_for("permute")
def permute(view: OpView) -> list[Strategy]:
    rank = view.inputs[0].dim()
    return [Strategy((P,), (P,))] + [Strategy((wrap(d, rank),), (j,)) for j, d in enumerate(view.args[1])]


@rule_for("transpose", "t")
def transpose(view: OpView) -> list[Strategy]:
    rank = view.inputs[0].dim()
    a, b = (wrap(view.args[1], rank), wrap(view.args[2], rank)) if len(view.args) == 3 else (0, rank - 1)
    swap = {a: b, b: a}
    return [Strategy((P,), (P,))] + [Strategy((d,), (swap.get(d, d),)) for d in range(rank)]


@rule_for("unsqueeze")
def unsqueeze(view: OpView) -> list[Strategy]:
    at = wrap(view.args[1], view.inputs[0].dim() + 1)
    return [Strategy((P,), (P,))] + [Strategy((d,), (d + (d >= at),)) for d in range(view.inputs[0].dim())]


@rule_for("squeeze")
def squeeze(view: OpView) -> list[Strategy]:
    shape = view.inputs[0].shape
    dims = view.arg(1, "dim", list(range(len(shape))))
    gone = {wrap(d, len(shape)) for d in ([dims] if isinstance(dims, int) else dims)}
    gone = {d for d in gone if shape[d] == 1}
    found, j = [Strategy((P,), (P,))], 0
    for d in range(len(shape)):
        if d not in gone:
            found.append(Strategy((d,), (j,)))
            j += 1
    return found


@rule_for("expand")
def expand(view: OpView) -> list[Strategy]:
    source, out = view.inputs[0], view.outputs[0]
    assert out is not None
    shift = out.dim() - source.dim()
    found = [Strategy((P,), (P,))]
    for j in range(out.dim()):
        if out.shape[j] == 1:
            continue
        grown = j < shift or source.shape[j - shift] == 1
        found.append(Strategy((R if grown else j - shift,), (j,)))
    return found


@rule_for("slice", "flip", "roll", "constant_pad_nd", "narrow", "unfold")
def keep_untouched(view: OpView) -> list[Strategy]:
    """Dimensions whose size and order the op leaves alone."""
    source, out = view.inputs[0], view.outputs[0]
    assert out is not None
    touched = _touched(view)
    found = [Strategy((d,), (d,)) for d in range(source.dim()) if d not in touched and source.shape[d] == out.shape[d]]
    fill = view.arg(2, "value", 0) if view.op.overloadpacket is aten.constant_pad_nd else 0
    return found + ([Strategy((P,), (P,))] if fill == 0 else [])


def _touched(view: OpView) -> set[int]:
    rank, name = view.inputs[0].dim(), view.op.overloadpacket
    if name is aten.slice or name is aten.unfold:
        dim = wrap(view.arg(1, "dim", 0), rank)
        full = name is aten.slice and view.inputs[0].shape[dim] == view.outputs[0].shape[dim]  # type: ignore[union-attr]
        return set() if full else {dim}
    if name is aten.flip:
        return {wrap(d, rank) for d in view.args[1]}
    if name is aten.roll:
        return {wrap(d, rank) for d in view.arg(2, "dims", ()) or range(rank)}
    if name is aten.constant_pad_nd:
        return {rank - 1 - i // 2 for i, amount in enumerate(view.args[1]) if amount != 0}
    return {wrap(view.args[1], rank)}


@rule_for("select")
def select(view: OpView) -> list[Strategy]:
    dim = wrap(view.arg(1, "dim", 0), view.inputs[0].dim())
    return [Strategy((P,), (P,))] + [Strategy((d,), (d - (d > dim),)) for d in range(view.inputs[0].dim()) if d != dim]


@rule_for("split", "split_with_sizes", "unbind", "chunk")
def split(view: OpView) -> list[Strategy]:
    rank, count = view.inputs[0].dim(), len(view.outputs)
    unbind = view.op.overloadpacket is aten.unbind
    dim = wrap(view.arg(1 if unbind else 2, "dim", 0), rank)
    found = [Strategy((P,), (P,) * count)]
    for d in range(rank):
        if d != dim:
            found.append(Strategy((d,), (d - (unbind and d > dim),) * count))
    return found


@rule_for("cat", "stack")
def cat(view: OpView) -> list[Strategy]:
    count, out = len(view.inputs), view.outputs[0]
    assert out is not None
    stack = view.op.overloadpacket is aten.stack
    dim = wrap(view.arg(1, "dim", 0), out.dim())
    found = [Strategy((P,) * count, (P,))]
    if any(t.dim() != out.dim() - stack for t in view.inputs):
        return []  # legacy empty tensors in a list
    for j in range(out.dim()):
        if j != dim:
            found.append(Strategy((j - (stack and j > dim),) * count, (j,)))
    return found


@rule_for("slice_backward", "select_backward")
def slice_backward(view: OpView) -> list[Strategy]:
    """Zeros with the gradient put in: (grad, input_sizes, dim, ...)."""
    sizes = view.args[1]
    rank = len(sizes)
    dim = wrap(view.args[2], rank)
    selects = view.op.overloadpacket is aten.select_backward
    found = [Strategy((P,), (P,))]
    for d in range(rank):
        if d != dim:
            found.append(Strategy((d - (selects and d > dim),), (d,)))
    return found


@rule_for("slice_scatter", "select_scatter")
def scatter_slice(view: OpView) -> list[Strategy]:
    rank = view.inputs[0].dim()
    dim = wrap(view.arg(2, "dim", 0), rank)
    selects = view.op.overloadpacket is aten.select_scatter
    found = [Strategy((P, P), (P,))]
    for d in range(rank):
        if d != dim:
            found.append(Strategy((d, d - (selects and d > dim)), (d,)))
    return found


# --------------------------------------------------------------------------- matrix products


@rule_for("mm")
def mm(view: OpView) -> list[Strategy]:
    return [
        Strategy((0, R), (0,)),
        Strategy((R, 1), (1,)),
        Strategy((1, 0), (P,)),
        Strategy((P, R), (P,)),
        Strategy((R, P), (P,)),
    ]


@rule_for("addmm")
def addmm(view: OpView) -> list[Strategy]:
    if view.kwargs.get("beta", 1) != 1 or view.kwargs.get("alpha", 1) != 1:
        return []
    bias, out = view.inputs[0], view.outputs[0]
    assert out is not None

    def place(d: int) -> int:
        own = d - (2 - bias.dim())
        return own if own >= 0 and bias.shape[own] == out.shape[d] else R

    return [Strategy((place(0), 0, R), (0,)), Strategy((place(1), R, 1), (1,)), Strategy((P, 1, 0), (P,))]


@rule_for("bmm")
def bmm(view: OpView) -> list[Strategy]:
    return [
        Strategy((0, 0), (0,)), Strategy((1, R), (1,)), Strategy((R, 2), (2,)), Strategy((2, 1), (P,)),
        Strategy((P, R), (P,)), Strategy((R, P), (P,)),
    ]  # fmt: skip


@rule_for("baddbmm")
def baddbmm(view: OpView) -> list[Strategy]:
    out = view.outputs[0]
    assert out is not None
    bias = view.inputs[0]
    if bias.shape != out.shape or view.kwargs.get("beta", 1) != 1 or view.kwargs.get("alpha", 1) != 1:
        return []
    return [Strategy((0, 0, 0), (0,)), Strategy((1, 1, R), (1,)), Strategy((2, R, 2), (2,)), Strategy((P, 2, 1), (P,))]


@rule_for("dot", "vdot")
def dot(view: OpView) -> list[Strategy]:
    return [Strategy((0, 0), (P,))]


# --------------------------------------------------------------------------- reductions


def _reduced(view: OpView) -> tuple[set[int], bool]:
    rank = view.inputs[0].dim()
    dims = view.arg(1, "dim", None)
    if isinstance(dims, bool):  # any.default has no dim
        dims = None
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        dims = list(range(rank))
    keep = bool(view.arg(2, "keepdim", False))
    return {wrap(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}, keep


def _passing(view: OpView, reduced: set[int], keep: bool) -> list[Strategy]:
    found, j = [], 0
    for d in range(view.inputs[0].dim()):
        if d in reduced:
            j += keep
            continue
        found.append(Strategy((d,), (j,) * len(view.outputs)))
        j += 1
    return found


@rule_for("sum")
def reduce_sum(view: OpView) -> list[Strategy]:
    reduced, keep = _reduced(view)
    return [Strategy((P,), (P,))] + _passing(view, reduced, keep) + [Strategy((d,), (P,)) for d in sorted(reduced)]


@rule_for("amax", "amin", "argmax", "argmin", "any", "all", "prod", "mean", "logsumexp")
def reduce_whole(view: OpView) -> list[Strategy]:
    return _passing(view, *_reduced(view))


@rule_for("max", "min", "median", "mode", "kthvalue")
def reduce_dim(view: OpView) -> list[Strategy]:
    if len(view.inputs) == 2:  # the larger of two tensors
        return pointwise(view)
    if len(view.outputs) == 1:
        return []
    first = 2 if view.op.overloadpacket is aten.kthvalue else 1  # after k
    dim = wrap(view.arg(first, "dim", -1), view.inputs[0].dim())
    return _passing(view, {dim}, bool(view.arg(first + 1, "keepdim", False)))


@rule_for("var", "std", "var_mean", "std_mean")
def reduce_moments(view: OpView) -> list[Strategy]:
    reduced, _ = _reduced(view)
    keep = bool(view.kwargs.get("keepdim", view.args[3] if len(view.args) > 3 else False))
    return _passing(view, reduced, keep)


def _except_dim(view: OpView, dim: int) -> list[Strategy]:
    rank = view.inputs[0].dim()
    if any(t.dim() != rank for t in view.inputs):
        return []
    return same_everywhere(view, [d for d in range(rank) if d != wrap(dim, rank)])


@rule_for("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "argsort")
def along_dim(view: OpView) -> list[Strategy]:
    dim = view.arg(1, "dim", -1) if view.op._overloadname != "stable" else view.kwargs.get("dim", -1)
    linear = [Strategy((P,), (P,))] if view.op.overloadpacket is aten.cumsum else []
    found = linear + _except_dim(view, dim)
    name = view.op._schema.name.split("::")[1]
    if name in ("_softmax", "_log_softmax"):
        split = wrap(dim, view.inputs[0].dim())
        found.append(Strategy((split,), (split,), lowering=f"{name[1:]}_cols"))
    return found


@rule_for("topk")
def topk(view: OpView) -> list[Strategy]:
    return _except_dim(view, view.arg(2, "dim", -1))


@rule_for("_softmax_backward_data", "_log_softmax_backward_data")
def softmax_backward(view: OpView) -> list[Strategy]:
    split = wrap(view.args[2], view.inputs[0].dim())
    name = view.op._schema.name.split("::")[1].removeprefix("_").removesuffix("_backward_data")
    return [
        *_except_dim(view, split),
        Strategy((P, R), (P,)),
        Strategy((split, split), (split,), lowering=f"{name}_cols_backward"),
    ]


@rule_for("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(view: OpView) -> list[Strategy]:
    """(log_probabilities, target, weight, reduction, ignore_index) -> (loss, total_weight).

    reduction: 0 none, 1 mean, 2 sum.
    """
    probabilities, rest = view.inputs[0], len(view.inputs) - 2
    if probabilities.dim() == 1:
        return []
    reduction = view.args[3]
    whole = (R,) * rest
    if reduction == 0:
        return [Strategy((0, 0, *whole), (0, P))] if rest == 0 else []
    found = [Strategy((0, 0, *whole), (R, R), lowering="nll_rows")]
    if rest == 0:
        found.append(Strategy((1, R), (R, R), lowering="nll_cols"))
    return found


@rule_for("nll_loss_backward", "nll_loss2d_backward")
def nll_loss_backward(view: OpView) -> list[Strategy]:
    """(grad, log_probabilities, target, weight, reduction, ignore_index, total_weight) -> grad of log_probabilities"""
    if view.inputs[1].dim() == 1:
        return []
    middle = (R,) * (len(view.inputs) - 4)
    grad = 0 if view.args[4] == 0 else R
    found = [Strategy((grad, 0, 0, *middle, R), (0,))]
    if not middle and view.args[4] != 0:
        found.append(Strategy((R, 1, R, R), (1,), lowering="nll_cols_backward"))
    return found


# --------------------------------------------------------------------------- normalization


@rule_for("native_layer_norm", "_fused_rms_norm")
def layer_norm(view: OpView) -> list[Strategy]:
    """Leading dimensions; weight and bias whole."""
    leading = view.inputs[0].dim() - len(view.args[1])
    rest = (R,) * (len(view.inputs) - 1)
    return [Strategy((d, *rest), (d,) * len(view.outputs)) for d in range(leading)]


@rule_for("native_layer_norm_backward", "_fused_rms_norm_backward")
def layer_norm_backward(view: OpView) -> list[Strategy]:
    """(grad, input, normalized_shape, mean, rstd, weight, bias): weight and bias gradients are partial sums."""
    leading = view.inputs[0].dim() - len(view.args[2])
    rank = view.inputs[0].dim()
    found = []
    for d in range(leading):
        places = [d if t.dim() == rank else R for t in view.inputs]
        found.append(Strategy(tuple(places), (d,) + (P,) * (len(view.outputs) - 1)))
    return found


@rule_for("native_group_norm")
def group_norm(view: OpView) -> list[Strategy]:
    """(input, weight?, bias?, N, C, HxW, group, eps) -> (out, mean, rstd): samples, which N counts."""
    return [Strategy((0, *(R,) * (len(view.inputs) - 1)), (0, 0, 0))]


@rule_for("native_group_norm_backward")
def group_norm_backward(view: OpView) -> list[Strategy]:
    """(grad, input, mean, rstd, weight?, N, C, HxW, group, output_mask) -> gradients of input, weight, bias"""
    return [Strategy((0, 0, 0, 0, *(R,) * (len(view.inputs) - 4)), (0, P, P))]


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


@rule_for(
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
    "max_pool3d_with_indices", "avg_pool3d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest1d", "upsample_linear1d",
    "reflection_pad2d", "replication_pad2d", "pixel_shuffle", "pixel_unshuffle",
    "max_pool2d_with_indices_backward", "avg_pool2d_backward", "_adaptive_avg_pool2d_backward",
    "upsample_nearest2d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "reflection_pad2d_backward", "replication_pad2d_backward",
)  # fmt: skip
def spatial(view: OpView) -> list[Strategy]:
    """Works on each image and channel alone (pixel shuffles: on each image)."""
    batched = 3 if "1d" in view.op._schema.name else 4
    if view.inputs[0].dim() < batched:
        return []
    channels = view.op.overloadpacket not in (aten.pixel_shuffle, aten.pixel_unshuffle)
    return same_everywhere(view, [0, 1] if channels else [0])


# --------------------------------------------------------------------------- constants


@rule_for("zeros", "ones", "full", "empty")
def constant(view: OpView) -> list[Strategy]:
    out = view.outputs[0]
    assert out is not None
    return [Strategy((), (d,)) for d in range(out.dim()) if out.shape[d] > 1]


@rule_for("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
def constant_like(view: OpView) -> list[Strategy]:
    """The value of the operand does not matter: any placement of it will do, so the result is split where it is."""
    source, out = view.inputs[0], view.outputs[0]
    assert out is not None
    if source.shape != out.shape:
        return [Strategy((s,), (R,)) for s in range(source.dim())]
    return same_everywhere(view, range(out.dim()))


@rule_for("arange", "scalar_tensor", "eye", "linspace", "tril_indices", "triu_indices")
def constant_whole(view: OpView) -> list[Strategy]:
    return []


@rule_for("tril", "triu")
def triangle(view: OpView) -> list[Strategy]:
    return [Strategy((P,), (P,)), *same_everywhere(view, range(view.inputs[0].dim() - 2))]


@rule_for("repeat")
def repeat(view: OpView) -> list[Strategy]:
    source, times = view.inputs[0], view.args[1]
    shift = len(times) - source.dim()
    return [Strategy((P,), (P,))] + [Strategy((d,), (d + shift,)) for d in range(source.dim()) if times[d + shift] == 1]
