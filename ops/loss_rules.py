"""Sharding rules of losses that stay one op: margins over classes, connectionist temporal classification, and the cross
entropy of a linear layer's rows."""

from __future__ import annotations

import torch

from ..kernels.linear_cross_entropy import linear_cross_entropy as forward_op
from ..kernels.linear_cross_entropy import linear_cross_entropy_backward as backward_op
from ..profiler import assumptions  # noqa: F401  defines the operator
from ..profiler.op_view import OpView
from .placement import P, R
from .rules import RULES, rule_for
from .strategy import Strategy

_NONE, _SUM = 0, 2  # a mean is a sum by the time it comes here (profiler/decompositions.py)


@rule_for("multi_margin_loss", "multilabel_margin_loss_forward")
def margin_loss(view: OpView) -> list[Strategy]:
    """(scores [N, C], target, ..., weight?, reduction) -> loss (and marks of the targets): samples."""
    reduction = view.arg(2 if len(view.outputs) == 2 else 5, "reduction", 1)
    if view.inputs[0].dim() != 2 or reduction not in (_NONE, _SUM):
        return []
    rest = (R,) * (len(view.inputs) - 2)
    return [Strategy((0, 0, *rest), (P if reduction == _SUM else 0, 0)[: len(view.outputs)])]


@rule_for("multi_margin_loss_backward", "multilabel_margin_loss_backward")
def margin_loss_backward(view: OpView) -> list[Strategy]:
    """(grad, scores [N, C], target, ..., reduction, marks of the targets or weights?) -> grad of scores"""
    marks = view.op._schema.name.endswith("multilabel_margin_loss_backward")
    reduction = view.arg(3 if marks else 6, "reduction", 1)
    if view.inputs[1].dim() != 2 or reduction not in (_NONE, _SUM):
        return []
    rest = (0 if marks else R,) * (len(view.inputs) - 3)
    return [Strategy((R if reduction == _SUM else 0, 0, 0, *rest), (0,))]


@rule_for("_ctc_loss")
def ctc_loss(view: OpView) -> list[Strategy]:
    """(log_probs [T, N, C], targets [N, S], input_lengths, target_lengths) -> (loss [N], alpha [N, T, 2 S + 1])"""
    if len(view.inputs) != 4 or view.inputs[0].dim() != 3 or view.inputs[1].dim() != 2:
        return []  # lengths that are numbers of the code, or targets one after the other
    return [Strategy((1, 0, 0, 0), (0, 0))]


@rule_for("_ctc_loss_backward")
def ctc_loss_backward(view: OpView) -> list[Strategy]:
    """(grad, log_probs, targets, input_lengths, target_lengths, loss, alpha) -> grad of log_probs"""
    if len(view.inputs) != 7 or view.inputs[1].dim() != 3 or view.inputs[2].dim() != 2:
        return []
    return [Strategy((0, 1, 0, 0, 0, 0, 0), (1,))]


def assumed(view: OpView) -> list[Strategy]:
    """(x, holds, line) -> x, on a condition that every rank has whole"""
    return [Strategy((P, R), (P,)), *(Strategy((d, R), (d,)) for d in range(view.inputs[0].dim()))]


RULES[torch.ops.shardwright.assumed] = assumed


def linear_cross_entropy(view: OpView) -> list[Strategy]:
    """(hidden [N, H], weight [V, H], bias?, target [N], ...) -> (loss [N], lse [N]): rows, or classes."""
    bias = len(view.inputs) - 3
    return [
        Strategy((0, R, *(R,) * bias, 0), (0, 0)),
        Strategy((R, 0, *(0,) * bias, R), (R, R), lowering="linear_cross_entropy_cols"),
    ]


def linear_cross_entropy_backward(view: OpView) -> list[Strategy]:
    """(grad [N], hidden, weight, bias?, target, lse, ...) -> gradients of hidden, weight, bias"""
    bias = len(view.inputs) - 5
    rows, cols = ((0, P, P), (P, 0, 0)) if bias else ((0, P, R), (P, 0, R))
    return [
        Strategy((0, 0, R, *(R,) * bias, 0, 0), rows),
        Strategy((R, R, 0, *(0,) * bias, R, R), cols, lowering="linear_cross_entropy_cols_backward"),
        Strategy((P, R, R, *(R,) * bias, R, R), (P, P, P if bias else R)),
    ]


RULES[forward_op.overloadpacket] = linear_cross_entropy
RULES[backward_op.overloadpacket] = linear_cross_entropy_backward
