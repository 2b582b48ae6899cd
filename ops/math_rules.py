"""Sharding rules of matrix products, reductions, softmax, losses and normalization."""

from __future__ import annotations

import torch

from ..profiler.op_view import OpView
from .placement import P, R
from .rules import RULES, aten, pointwise, rule_for, same_everywhere, wrap
from .strategy import Strategy

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


def matmul(view: OpView) -> list[Strategy]:
    """Of stacks of matrices in the same leading dimensions."""
    rows = view.inputs[0].dim() - 2
    columns = rows + 1
    return [
        *(Strategy((d, d), (d,)) for d in range(rows)),
        Strategy((rows, R), (rows,)), Strategy((R, columns), (columns,)), Strategy((columns, rows), (P,)),
        Strategy((P, R), (P,)), Strategy((R, P), (P,)),
    ]  # fmt: skip


RULES[torch.ops.shardwright.matmul] = matmul


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


@rule_for("glu", "glu_backward")
def gated(view: OpView) -> list[Strategy]:
    """One half of a dimension times the sigmoid of the other: (x, dim), and (grad, x, dim)"""
    return _except_dim(view, view.args[-1] if len(view.args) > len(view.inputs) else -1)


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
