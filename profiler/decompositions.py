"""Ops that a joint graph holds as sums and elementwise ops, so that they can be split. Few: fused kernels are kept.

Means become sums, because a sum over a sharded dimension is a partial sum even when the shards are uneven, and a mean
is not; so do the losses that take a mean inside. What is left in the table is rare, and cheap beside what it allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._torch import decompositions_of

aten = torch.ops.aten
_NONE, _MEAN, _SUM = 0, 1, 2


def _count(x: torch.Tensor, dims: Sequence[int] | None) -> int:
    count = 1
    for d in range(x.dim()) if not dims else dims:
        count *= x.shape[d]
    return count


def _mean(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.div(torch.sum(x, dtype=dtype), _count(x, None))


def _mean_dim(x: torch.Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.div(torch.sum(x, dim, keepdim, dtype=dtype), _count(x, dim))


def _weight_norm_backward(
    grad: torch.Tensor, v: torch.Tensor, g: torch.Tensor, norms: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """w = v g / |v|, the norm over all dimensions but `dim` (Salimans and Kingma, arXiv:1602.07868, equation 3)."""
    norms = norms.to(v.dtype)
    inner = (grad * v).sum([d for d in range(v.dim()) if d != dim], keepdim=True)
    return (g / norms) * (grad - v * (inner / norms.square())), inner / norms


def _samples(x: torch.Tensor) -> int:
    return x.shape[0] if x.dim() > 1 else 1


def _margin(x: Any, target: Any, p: Any = 1, margin: Any = 1, weight: Any = None, reduction: int = _MEAN) -> Any:
    """A mean as a sum over samples, which a batch in parts has."""
    if reduction != _MEAN:
        return NotImplemented
    return aten.multi_margin_loss(x, target, p, margin, weight, _SUM) / _samples(x)


def _margin_backward(
    grad: Any, x: Any, target: Any, p: Any, margin: Any, weight: Any = None, reduction: int = _MEAN
) -> Any:
    if reduction != _MEAN:
        return NotImplemented
    return aten.multi_margin_loss_backward(grad / _samples(x), x, target, p, margin, weight, _SUM)


def _multilabel(x: Any, target: Any, reduction: int) -> Any:
    if reduction != _MEAN:
        return NotImplemented
    loss, is_target = aten.multilabel_margin_loss_forward(x, target, _SUM)
    return loss / _samples(x), is_target


def _multilabel_backward(grad: Any, x: Any, target: Any, reduction: int, is_target: Any) -> Any:
    if reduction != _MEAN:
        return NotImplemented
    return aten.multilabel_margin_loss_backward(grad / _samples(x), x, target, _SUM, is_target)


def _nothing(*_: Any, **__: Any) -> None:
    """A check of LAPACK's return code has no result that a graph could hold."""


_OWN: dict[Any, Callable[..., Any]] = {
    aten.mean.default: _mean,
    aten.mean.dim: _mean_dim,
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
    aten.multi_margin_loss.default: _margin,
    aten.multi_margin_loss_backward.default: _margin_backward,
    aten.multilabel_margin_loss_forward.default: _multilabel,
    aten.multilabel_margin_loss_backward.default: _multilabel_backward,
    aten._linalg_check_errors.default: _nothing,
}
DECOMPOSITIONS = _OWN | decompositions_of(
    "mse_loss", "mse_loss_backward", "smooth_l1_loss", "smooth_l1_loss_backward", "huber_loss", "huber_loss_backward",
    "binary_cross_entropy", "binary_cross_entropy_backward", "soft_margin_loss", "soft_margin_loss_backward",
    "_weight_norm_interface", "addr", "rot90", "trace", "diagonal_backward", "unfold_backward", "channel_shuffle",
    "affine_grid_generator", "aminmax", "renorm", "block_diag", "take", "norm",
)  # fmt: skip
