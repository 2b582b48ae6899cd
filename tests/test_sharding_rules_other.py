"""Sharding rules of ops that no small model has, on random tensors, against the op itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured import PRESETS, recorded
from one_op import OneOp, assert_same
from torch import fx
from torch.utils import _pytree as pytree

from shardwright.kernels import ops as kernels
from shardwright.ops.catalog import strategies
from shardwright.ops.rules import RULES
from shardwright.ops.strategy import replicated
from shardwright.profiler.op_view import is_op

aten, experts = torch.ops.aten, torch.ops.shardwright
generator = torch.Generator().manual_seed(0)
CASES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
NOT_ON_CPU = {aten._fused_rms_norm_backward}
NEVER_SPLIT = {aten.arange, aten.scalar_tensor, aten.eye, aten.linspace, aten.tril_indices, aten.triu_indices}
CHUNKED = {experts.linear_cross_entropy, experts.linear_cross_entropy_backward}
OF_SEQUENCES = {experts.recurrence, experts.recurrence_backward, experts.scan, experts.scan_backward}


def case(op: Any, *args: Any, **kwargs: Any) -> None:
    CASES.append((op, args, kwargs))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=generator)


def node_of(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.Node, list[torch.Tensor]]:
    """The call as a node over placeholders."""
    graph, values = fx.Graph(), []

    def placeholder(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        node = graph.placeholder(f"x{len(values)}")
        node.meta["val"] = leaf
        values.append(leaf)
        return node

    node = graph.call_function(op, *pytree.tree_map(placeholder, (args, kwargs)))
    node.meta["val"] = op(*args, **kwargs)
    if isinstance(node.meta["val"], list):
        node.meta["val"] = tuple(node.meta["val"])
    return node, values


X, Y, ROW = randn(6, 4, 5), randn(6, 4, 5), randn(4, 1)
MASK = X > 0

# pointwise
for unary in (
    aten.relu,
    aten.gelu,
    aten.silu,
    aten.tanh,
    aten.sigmoid,
    aten.exp,
    aten.abs,
    aten.neg,
    aten.clone,
    aten.erf,
):
    case(unary.default, X)
for binary in (aten.add, aten.sub, aten.mul, aten.div):
    case(binary.Tensor, X, Y)
    case(binary.Tensor, X, ROW)
    case(binary.Tensor, ROW, X)
    case(binary.Tensor, X, integers(9, 5) + 1)
    case(binary.Scalar, X, 3.0)
    case(binary.Tensor, X, torch.tensor(2.0, dtype=torch.float64))
case(aten.add.Tensor, X, Y, alpha=3)
case(aten.rsub.Scalar, X, 2.0)
for rounding in ("floor", "trunc"):
    case(aten.div.Tensor_mode, X, Y, rounding_mode=rounding)
    case(aten.div.Scalar_mode, X, 2.0, rounding_mode=rounding)
case(aten.where.self, MASK, X, ROW)
case(aten.where.ScalarOther, MASK, X, 1.0)
case(aten.masked_fill.Scalar, X, MASK[:, :, :1], 2.0)
case(aten.masked_fill.Tensor, X, MASK, torch.tensor(2.0, dtype=torch.float64))
case(aten.polar.default, X.abs(), Y)
case(aten.floor_divide.default, X, ROW.abs() + 1)
case(aten.log_sigmoid_backward.default, X, Y, torch.nn.functional.logsigmoid(Y).exp())
case(aten.masked_fill.Scalar, X, MASK, 0.0)
case(aten.maximum.default, X, Y)
case(aten.clamp.default, X, -1.0, 1.0)
case(aten.pow.Tensor_Scalar, X, 2)
case(aten.reciprocal.default, X)
case(aten.addcmul.default, X, Y, X)
case(aten.lerp.Scalar, X, Y, 0.3)
case(aten.lt.Tensor, X, ROW)
case(aten.logical_and.default, MASK, MASK)
case(aten._to_copy.default, X, dtype=torch.int64)
case(aten._to_copy.default, X, dtype=torch.float32)
case(aten._to_copy.default, MASK, dtype=torch.float64)
for backward in (
    aten.silu_backward,
    aten.tanh_backward,
    aten.sigmoid_backward,
    aten.gelu_backward,
    aten.hardswish_backward,
):
    case(backward.default, X, Y)
case(aten.threshold_backward.default, X, Y, 0)
case(aten.hardtanh_backward.default, X, Y, -1.0, 1.0)
case(aten.leaky_relu_backward.default, X, Y, 0.1, False)
case(aten.elu_backward.default, X, 1.0, 1.0, 1.0, False, Y)
case(aten.softplus_backward.default, X, Y, 1.0, 20.0)
case(aten.native_dropout_backward.default, X, MASK, 2.0)
# views
for sizes in ([24, 5], [6, 20], [3, 2, 4, 5], [6, 2, 2, 5], [120], [6, 4, 1, 5], [2, 60], [4, 6, 5]):
    case(aten.view.default, X, sizes)
    case(aten.reshape.default, X.transpose(0, 1), sizes)
case(aten._unsafe_view.default, randn(24, 5), [6, 4, 5])
case(aten.view.default, randn(1, 6, 5), [6, 1, 5])
case(aten.permute.default, X, [2, 0, -2])
case(aten.transpose.int, X, 0, -1)
case(aten.t.default, X[0])
case(aten.unsqueeze.default, X, 1)
case(aten.unsqueeze.default, X, -1)
case(aten.squeeze.default, randn(1, 6, 1, 5))
case(aten.squeeze.dim, randn(6, 1, 5), 1)
case(aten.squeeze.dim, randn(6, 1, 5), 0)
case(aten.squeeze.dims, randn(6, 1, 5, 1), [1, -1])
case(aten.expand.default, randn(1, 5), [6, 4, 5])
case(aten.expand.default, randn(6, 1, 5), [-1, 4, -1])
for bounds in ((0, 0, 6), (1, 1, 3), (2, 0, 5, 2)):
    case(aten.slice.Tensor, X, *bounds)
case(aten.flip.default, X, [0, -1])
case(aten.roll.default, X, [2], [1])
case(aten.roll.default, X, [2])
case(aten.roll.default, X, [2], [])
case(aten.constant_pad_nd.default, X, [1, 2, 0, 0], 0.0)
case(aten.constant_pad_nd.default, X, [1, 2], 1.0)
case(aten.narrow.default, X, 1, 1, 2)
case(aten.unfold.default, X, 1, 2, 1)
case(aten.select.int, X, 1, 2)
case(aten.split.Tensor, X, 2, 1)
case(aten.split_with_sizes.default, X, [1, 4], -1)
case(aten.unbind.int, X, 1)
case(aten.chunk.default, X, 2, 0)
case(aten.cat.default, [X, Y], 1)
case(aten.cat.default, [X, randn(6, 1, 5)], -2)
case(aten.stack.default, [X, Y], 1)
case(aten.slice_backward.default, X, [6, 8, 5], 1, 2, 6, 1)
case(aten.select_backward.default, X[:, 0], [6, 4, 5], 1, 2)
case(aten.slice_scatter.default, X, randn(6, 2, 5), 1, 1, 3)
case(aten.select_scatter.default, X, randn(6, 5), 1, 2)
# matrix products
case(aten.mm.default, randn(6, 5), randn(5, 4))
for bias in (randn(4), randn(6, 4), randn(6, 1), randn(1, 4), randn(1)):
    case(aten.addmm.default, bias, randn(6, 5), randn(5, 4))
case(aten.addmm.default, randn(4), randn(6, 5), randn(5, 4), beta=2)
case(aten.bmm.default, randn(6, 5, 3), randn(6, 3, 4))
case(experts.matmul.default, randn(4, 6, 5, 3), randn(4, 6, 3, 8))
case(aten.baddbmm.default, randn(6, 5, 4), randn(6, 5, 3), randn(6, 3, 4))
case(aten.baddbmm.default, randn(4), randn(6, 5, 3), randn(6, 3, 4))
case(aten.dot.default, randn(5), randn(5))
case(aten.vdot.default, randn(6), randn(6))
# reductions
case(aten.sum.default, X)
case(aten.sum.default, MASK)
for dims in ([1], [0, -1], []):
    case(aten.sum.dim_IntList, X, dims, True)
    case(aten.sum.dim_IntList, X, dims)
case(aten.mean.default, X)
for reduction in (aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default):
    case(reduction, X, [1], True)
    case(reduction, X, [-1, 0])
for arg in (aten.argmax.default, aten.argmin.default):
    case(arg, X)
    case(arg, X, 1)
    case(arg, X, -1, True)
case(aten.any.default, MASK)
case(aten.any.dim, MASK, 1)
case(aten.all.default, MASK)
case(aten.all.dim, MASK, -1, True)
case(aten.prod.default, X)
case(aten.prod.dim_int, X, 1)
for pair in (aten.max, aten.min, aten.median):
    case(pair.default, X)
    case(pair.dim, X, 1)
    case(pair.dim, X, -1, True)
case(aten.max.other, X, Y)
case(aten.mode.default, X)
case(aten.mode.default, X, 0)
case(aten.kthvalue.default, X, 2)
case(aten.kthvalue.default, X, 2, 1, True)
case(aten.kthvalue.default, X, 2, 0)
for moment in (aten.var, aten.std, aten.var_mean, aten.std_mean):
    case(moment.correction, X, [1], correction=1, keepdim=True)
    case(moment.correction, X)
    case(moment.dim, X, [0], True, True)
    case(moment.default, X)
# along a dimension
for along in (aten._softmax.default, aten._log_softmax.default):
    case(along, X, 1, False)
    case(along, X, -1, False)
case(aten._safe_softmax.default, X, 1)
for along in (aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default):
    case(along, X, 1)
    case(along, X, -1)
case(aten.sort.default, X)
case(aten.sort.default, X, 0, True)
case(aten.sort.stable, X, stable=True, dim=1)
case(aten.argsort.default, X, 1)
case(aten.topk.default, X, 2)
case(aten.topk.default, X, 2, 0)
for dim in (1, -1):
    case(aten._softmax_backward_data.default, X, Y.softmax(dim), dim, torch.float64)
    case(aten._log_softmax_backward_data.default, X, Y.log_softmax(dim), dim, torch.float64)
# losses
SCORES, TARGET, WEIGHT = randn(6, 5).log_softmax(1), torch.tensor([0, 4, -100, 2, 1, 3]), randn(5).abs()
SCORES_2D, TARGET_2D = randn(6, 5, 2, 3).log_softmax(1), integers(5, 6, 2, 3)
for reduction in (0, 1, 2):
    for weight in (None, WEIGHT):
        case(aten.nll_loss_forward.default, SCORES, TARGET, weight, reduction, -100)
        case(aten.nll_loss2d_forward.default, SCORES_2D, TARGET_2D, weight, reduction, 2)
        _, total = aten.nll_loss_forward(SCORES, TARGET, weight, reduction, -100)
        grad = randn(6) if reduction == 0 else randn()
        case(aten.nll_loss_backward.default, grad, SCORES, TARGET, weight, reduction, -100, total)
        _, total = aten.nll_loss2d_forward(SCORES_2D, TARGET_2D, weight, reduction, 2)
        grad = randn(6, 2, 3) if reduction == 0 else randn()
        case(aten.nll_loss2d_backward.default, grad, SCORES_2D, TARGET_2D, weight, reduction, 2, total)
case(aten.nll_loss_forward.default, SCORES[0], TARGET[0], None, 1, -100)
# normalization
for weight, bias in ((None, None), (randn(5), randn(5))):
    case(aten.native_layer_norm.default, X, [5], weight, bias, 1e-5)
    _, mean, rstd = aten.native_layer_norm(X, [5], weight, bias, 1e-5)
    mask = [True, weight is not None, bias is not None]
    case(aten.native_layer_norm_backward.default, Y, X, [5], mean, rstd, weight, bias, mask)
    case(aten._fused_rms_norm.default, X, [5], weight, 1e-5)
case(aten.native_layer_norm.default, X, [4, 5], randn(4, 5), randn(4, 5), 1e-5)
IMAGE = randn(6, 4, 6, 6)
for weight, bias in ((None, None), (randn(4), randn(4))):
    case(aten.native_group_norm.default, IMAGE, weight, bias, 6, 4, 36, 2, 1e-5)
    _, mean, rstd = aten.native_group_norm(IMAGE, weight, bias, 6, 4, 36, 2, 1e-5)
    mask = [True, weight is not None, bias is not None]
    case(aten.native_group_norm_backward.default, randn(6, 4, 6, 6), IMAGE, mean, rstd, weight, 6, 4, 36, 2, mask)
# lookups
INDEX = integers(6, 3, 4)
for padding in (-1, 2):
    case(aten.embedding.default, randn(6, 5), INDEX, padding)
    case(aten.embedding_dense_backward.default, randn(3, 4, 5), INDEX, 6, padding, False)
    case(aten.embedding_dense_backward.default, randn(3, 4, 5), INDEX, 6, padding, True)
case(aten.embedding.default, randn(7, 4), integers(7, 6))
case(aten.gather.default, X, 1, integers(4, 6, 2, 5))
case(aten.gather.default, X, -1, integers(5, 6, 4, 5))
case(aten.scatter.src, X, 1, integers(4, 6, 4, 5).sort(1)[0] * 0 + torch.arange(4)[:, None], Y)
case(aten.scatter.value, X, 1, integers(4, 6, 4, 5), 1.5)
case(aten.scatter_add.default, X, 0, integers(6, 6, 4, 5), Y)
COLUMN, LAST = integers(4, 3), integers(5, 3)
case(aten.index.Tensor, X, [None, COLUMN])
case(aten.index.Tensor, X, [integers(6, 3, 2)])
case(aten.index.Tensor, X, [None, COLUMN, LAST])
case(aten.index.Tensor, X, [integers(6, 3), None, LAST])
case(aten.index.Tensor, X, [integers(6, 3, 1), integers(4, 4)])
case(aten.index_select.default, X, 1, integers(4, 6))
for accumulate in (False, True):
    rows = torch.tensor([3, 0, 5])
    case(aten.index_put.default, X, [rows], randn(3, 4, 5), accumulate)
    case(aten.index_put.default, X, [rows, torch.tensor([1, 0, 3])], randn(3, 5), accumulate)
    case(aten._unsafe_index_put.default, X, [None, torch.tensor([3, 1])], randn(6, 2, 5), accumulate)
case(aten.index_put.default, torch.zeros(6, 5, dtype=torch.float64), [INDEX], randn(3, 4, 5), True)
case(aten.index_put.default, torch.zeros(6, 5, dtype=torch.float64), [INDEX], randn(5), True)
# convolution and pooling
for groups, transposed in ((1, False), (2, False), (1, True)):
    kernel = randn(4, 4 if transposed else 4 // groups, 3, 3)
    for bias in (None, randn(4)):
        convolution = (
            [2, 2] if transposed else [1, 1],
            [1, 1],
            [1, 1],
            transposed,
            [1, 1] if transposed else [0, 0],
            groups,
        )
        case(aten.convolution.default, IMAGE, kernel, bias, *convolution)
        out = aten.convolution(IMAGE, kernel, bias, *convolution)
        mask = [True, True, bias is not None]
        case(aten.convolution_backward.default, torch.randn_like(out), IMAGE, kernel, [4] if bias is not None else None,
             *convolution, mask)  # fmt: skip
case(aten.convolution.default, randn(6, 4, 8), randn(5, 4, 3), randn(5), [1], [0], [1], False, [0], 1)
out, indices = aten.max_pool2d_with_indices(IMAGE, [2, 2])
case(aten.max_pool2d_with_indices.default, IMAGE, [2, 2])
case(aten.max_pool2d_with_indices_backward.default, out, IMAGE, [2, 2], [2, 2], [0, 0], [1, 1], False, indices)
case(aten.avg_pool2d.default, IMAGE, [2, 2])
case(aten.avg_pool2d.default, IMAGE[0], [2, 2])
case(aten.avg_pool2d_backward.default, out, IMAGE, [2, 2], [2, 2], [0, 0], False, True, None)
case(aten._adaptive_avg_pool2d.default, IMAGE, [3, 3])
case(aten._adaptive_avg_pool2d_backward.default, out, IMAGE)
case(aten.adaptive_max_pool2d.default, IMAGE, [3, 3])
case(aten.max_pool3d_with_indices.default, randn(6, 4, 2, 4, 4), [2, 2, 2])
case(aten.avg_pool3d.default, randn(6, 4, 2, 4, 4), [2, 2, 2])
case(aten.upsample_nearest1d.default, X, [10])
case(aten.upsample_linear1d.default, X, [10], False)
case(aten.upsample_nearest2d.default, IMAGE, [12, 12])
case(aten.upsample_bilinear2d.default, IMAGE, [12, 9], False)
case(aten.upsample_bicubic2d.default, IMAGE, [12, 9], True)
BIG = randn(6, 4, 12, 12)
case(aten.upsample_nearest2d_backward.default, BIG, [12, 12], [6, 4, 6, 6])
case(aten.upsample_bilinear2d_backward.default, BIG, [12, 12], [6, 4, 6, 6], False)
case(aten.upsample_bicubic2d_backward.default, BIG, [12, 12], [6, 4, 6, 6], False)
for pad, backward in (
    (aten.reflection_pad2d, aten.reflection_pad2d_backward), (aten.replication_pad2d, aten.replication_pad2d_backward),
):  # fmt: skip
    case(pad.default, IMAGE, [1, 2, 1, 0])
    case(backward.default, randn(6, 4, 7, 9), IMAGE, [1, 2, 1, 0])
case(aten.pixel_shuffle.default, IMAGE, 2)
case(aten.pixel_unshuffle.default, IMAGE, 2)
# constants
case(aten.zeros.default, [6, 4, 5], dtype=torch.float64)
case(aten.ones.default, [6, 1, 5])
case(aten.full.default, [6, 5], 3.5)
case(aten.empty.memory_format, [6, 5])
case(aten.eye.default, 5)
case(aten.linspace.default, 0.0, 1.0, 5)
case(aten.tril_indices.default, 4, 4)
case(aten.triu_indices.default, 4, 4)
case(aten.arange.default, 6)
case(aten.scalar_tensor.default, 2.0)
for like in (aten.zeros_like, aten.ones_like, aten.empty_like):
    case(like.default, X)
case(aten.full_like.default, X, 2.0)
for sizes in ([6, 4, 5], [3, 2]):
    for new in (aten.new_zeros, aten.new_ones, aten.new_empty):
        case(new.default, X, sizes)
    case(aten.new_full.default, X, sizes, 2.0)
case(aten.tril.default, X, 1)
case(aten.triu.default, X[0])
case(aten.repeat.default, X, [1, 2, 1])
case(aten.repeat.default, X, [2, 1, 1, 3])
# ours: random numbers and attention are cut by place in the whole tensor
KEY = kernels.make_key(3, 1, 2, 4)
for draw in (kernels.rand_uniform, kernels.rand_normal):
    case(draw, KEY, [6, 4, 5], [6, 4, 5], [0, 0, 0], 1, torch.float64, torch.device("cpu"))
case(kernels.dropout, X, KEY, 0.4, 1, [6, 4, 5], [0, 0, 0])
for kv_heads, causal, window in ((4, True, 0), (2, False, 0), (1, False, 3)):
    query, key, value = randn(6, 4, 5, 8), randn(6, kv_heads, 5, 8), randn(6, kv_heads, 5, 8)
    flags = (None, KEY, 0.3, causal, window, 0.25, 1, [6, 4, 5, 5], [0, 0, 0, 0])
    case(kernels.attention, query, key, value, *flags)
    out, lse = kernels.attention(query, key, value, *flags)
    case(kernels.attention_backward, randn(6, 4, 5, 8), query, key, value, None, KEY, out, lse, *flags[2:], False)

# experts: choices of an expert outside 0..3 add nothing
hidden, chosen, weights = randn(6, 5), integers(4, 6, 2), randn(6, 2).abs()
gate_up, down = randn(4, 6, 5), randn(4, 5, 3)
case(experts.expert_mlp.default, hidden, chosen, weights, gate_up, down, "silu")
_, pre = experts.expert_mlp(hidden, chosen, weights, gate_up, down, "silu")
for kept in (pre, None):
    case(experts.expert_mlp_backward.default, randn(6, 5), hidden, chosen, weights, gate_up, down, kept, "silu")

# elementwise ops that torch does not mark so
for backward in (aten.mish_backward, aten.hardsigmoid_backward):
    case(backward.default, X, Y)
for shrink in (aten.softshrink_backward, aten.hardshrink_backward):
    case(shrink.default, X, Y, 0.3)
case(aten.hardswish.default, X)
case(aten._prelu_kernel.default, X, randn(1, 4, 1))
case(aten._prelu_kernel_backward.default, X, Y, randn(1, 4, 1))
case(aten.fill.Scalar, X, 2.0)
case(aten.complex.default, X, Y)
case(aten.log_sigmoid_forward.default, X)
case(aten.isclose.default, X, Y)
for dim in (-1, 0):
    halves = randn(6, 4, 8)
    case(aten.glu.default, halves, dim)
    case(aten.glu_backward.default, aten.glu(halves, dim), halves, dim)
# losses over margins, and over alignments
MARGIN_TARGET, MANY = integers(5, 6), integers(5, 6, 5)
for reduction in (0, 1, 2):
    grad = randn(6) if reduction == 0 else randn()
    for weight in (None, WEIGHT):
        case(aten.multi_margin_loss.default, SCORES, MARGIN_TARGET, 1, 1.0, weight, reduction)
        case(aten.multi_margin_loss_backward.default, grad, SCORES, MARGIN_TARGET, 1, 1.0, weight, reduction)
    case(aten.multilabel_margin_loss_forward.default, SCORES, MANY, reduction)
    _, marks = aten.multilabel_margin_loss_forward(SCORES, MANY, reduction)
    case(aten.multilabel_margin_loss_backward.default, grad, SCORES, MANY, reduction, marks)
FRAMES, LABELS, LENGTHS = (
    randn(7, 6, 5).log_softmax(-1),
    integers(4, 6, 2) + 1,
    (torch.full((6,), 7), torch.full((6,), 2)),
)
case(aten._ctc_loss.Tensor, FRAMES, LABELS, *LENGTHS)
found = aten._ctc_loss(FRAMES, LABELS, *LENGTHS)
case(aten._ctc_loss_backward.Tensor, randn(6), FRAMES, LABELS, *LENGTHS, *found, 0)
case(torch.ops.shardwright.assumed.default, X, torch.tensor(True), "model.py:1")
# matrices, transforms, distances
MATRICES = randn(6, 3, 4, 4) @ randn(6, 3, 4, 4).mT * 0.1 + 2 * torch.eye(4, dtype=torch.float64)
case(aten.linalg_inv_ex.default, MATRICES)
case(aten.linalg_cholesky_ex.default, MATRICES @ MATRICES.mT)
case(aten.linalg_solve_triangular.default, MATRICES.tril(), randn(6, 3, 4, 2), upper=False)
case(aten._linalg_det.default, MATRICES)
case(aten._linalg_slogdet.default, MATRICES)
case(aten._linalg_solve_ex.default, MATRICES, randn(6, 3, 4, 2))
case(aten._linalg_eigh.default, MATRICES + MATRICES.mT)
case(aten._linalg_svd.default, MATRICES)
case(aten.linalg_qr.default, MATRICES)
case(aten.linalg_matrix_exp.default, MATRICES)
case(aten.linalg_lu.default, MATRICES)
factors, pivots, _ = aten.linalg_lu_factor_ex(MATRICES)
case(aten.linalg_lu_factor_ex.default, MATRICES)
case(aten.linalg_lu_solve.default, factors, pivots, randn(6, 3, 4, 2))
case(aten.lu_unpack.default, factors, pivots)
case(aten.cholesky_solve.default, randn(6, 3, 4, 2), aten.linalg_cholesky_ex(MATRICES @ MATRICES.mT)[0])
case(aten.cholesky_inverse.default, aten.linalg_cholesky_ex(MATRICES @ MATRICES.mT)[0])
case(aten.triangular_solve.default, randn(6, 3, 4, 2), MATRICES.triu())
case(aten.linalg_householder_product.default, MATRICES, randn(6, 3, 4))
case(aten.linalg_eig.default, MATRICES + MATRICES.mT)
case(aten._linalg_eigvals.default, MATRICES + MATRICES.mT)
case(aten._fft_r2c.default, X, [2], 0, True)
case(aten._fft_c2c.default, torch.complex(X, Y), [1], 0, True)
case(aten._fft_c2r.default, torch.complex(X, Y), [2], 0, 8)
case(aten._cdist_forward.default, randn(6, 4, 3), randn(6, 5, 3), 2.0, None)
case(aten._cdist_backward.default, randn(6, 4, 5), randn(6, 4, 3), randn(6, 5, 3), 1.0, randn(6, 4, 5).abs())
case(aten.mv.default, randn(6, 4), randn(4))
# sums and copies into rows
for add in (aten.index_add.default, aten.index_copy.default):
    case(add, X, 1, torch.tensor([2, 0]), Y[:, :2])
case(aten.index_add.default, X, 0, torch.tensor([2, 0, 2]), Y[:3])
case(aten.index_reduce.default, X, 1, torch.tensor([2, 0]), Y[:, :2], "mean")
for reduce in ("sum", "amax", "mean"):
    case(aten.scatter_reduce.two, X, 1, integers(4, 6, 4, 5), Y, reduce)
# all kinds of pooling, padding and resizing
SIGNAL, VOLUME = randn(6, 4, 9), randn(6, 4, 4, 4, 4)
for image, sizes, kinds in (
    (SIGNAL, [12], ("upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_linear1d")),
    (IMAGE, [9, 12], ("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
                      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")),
    (VOLUME, [6, 6, 8], ("upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d")),
):  # fmt: skip
    for kind in kinds:
        corners = [] if "nearest" in kind else [False]
        case(getattr(aten, kind).default, image, sizes, *corners)
        given = randn(*image.shape[:2], *sizes)
        case(getattr(aten, f"{kind}_backward").default, given, sizes, list(image.shape), *corners)
for image in (SIGNAL, IMAGE, VOLUME):
    rank = image.dim() - 2
    for kind in ("reflection", "replication"):
        pad, backward = getattr(aten, f"{kind}_pad{rank}d"), getattr(aten, f"{kind}_pad{rank}d_backward")
        case(pad.default, image, [1, 2] * rank)
        case(backward.default, randn(*pad(image, [1, 2] * rank).shape), image, [1, 2] * rank)
for image, rank in ((IMAGE, 2), (VOLUME, 3)):
    out, indices = getattr(aten, f"adaptive_max_pool{rank}d")(image, [2] * rank)
    case(getattr(aten, f"adaptive_max_pool{rank}d").default, image, [2] * rank)
    case(getattr(aten, f"adaptive_max_pool{rank}d_backward").default, randn(*out.shape), image, indices)
    case(getattr(aten, f"_adaptive_avg_pool{rank}d_backward").default, randn(*out.shape), image)
case(aten._adaptive_avg_pool3d.default, VOLUME, [2, 2, 2])
out, indices = aten.max_pool3d_with_indices(VOLUME, [2, 2, 2])
pool = ([2] * 3, [2] * 3, [0] * 3)
case(aten.max_pool3d_with_indices_backward.default, randn(*out.shape), VOLUME, *pool, [1] * 3, False, indices)
case(aten.avg_pool3d_backward.default, randn(*out.shape), VOLUME, *pool, False, True, None)
case(aten.im2col.default, IMAGE, [2, 2], [1, 1], [0, 0], [1, 1])
case(aten.col2im.default, randn(6, 16, 25), [6, 6], [2, 2], [1, 1], [0, 0], [1, 1])

UNDEFINED = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}


@pytest.mark.parametrize("size", [2, 3])
def test_shards_of_every_strategy_make_the_whole_result(size: int) -> None:
    wrong = []
    for op, args, kwargs in CASES:
        one = OneOp(*node_of(op, args, kwargs))
        for strategy in one.strategies(size):
            try:
                found = one.sharded([strategy], {"tp": size}, check_copies=op not in UNDEFINED)
                for a, b in zip(found, one.whole, strict=True):
                    if op in UNDEFINED:
                        assert a.shape == b.shape
                    else:
                        assert_same(a, b)
            except Exception as error:
                wrong.append(f"{one.node.format_node()} {one.view.shapes}: {strategy}: {str(error)[:300]}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


def test_every_rule_is_tried() -> None:
    """Here or on the small models, with a strategy that splits something."""
    split = set()
    for op, args, kwargs in CASES:
        node, _ = node_of(op, args, kwargs)
        if any(s != replicated(OneOp(*node_of(op, args, kwargs)).view) for s in strategies(node)[0]):
            split.add(getattr(op, "overloadpacket", op))
    for preset in PRESETS:
        for one in recorded(preset):
            split |= {n.target.overloadpacket for n in one.segment.joint.graph.nodes if is_op(n)}
    tried_elsewhere = OF_SEQUENCES | CHUNKED  # in test_recurrent_layers.py, test_scans.py and test_chunked_loss.py
    ours = {op for op in RULES if not str(op).startswith("shardwright_tests.")}  # which other tests add
    assert ours - split - NEVER_SPLIT - NOT_ON_CPU - tried_elsewhere == set()
