"""Sharding rules of linear algebra, Fourier transforms and distances: matrices, and dimensions, that are apart."""

from __future__ import annotations

from ..profiler.op_view import OpView
from .placement import P, R
from .rules import rule_for, wrap
from .strategy import Strategy


@rule_for(
    "linalg_inv_ex", "linalg_cholesky_ex", "linalg_solve_triangular", "triangular_solve", "cholesky_solve",
    "cholesky_inverse", "_linalg_det", "_linalg_slogdet", "_linalg_solve_ex", "linalg_lu_factor_ex", "linalg_lu_solve",
    "_linalg_eigh", "linalg_eig", "_linalg_eigvals", "_linalg_svd", "linalg_qr", "linalg_matrix_exp",
    "linalg_householder_product", "linalg_lu", "lu_unpack",
)  # fmt: skip
def matrices(view: OpView) -> list[Strategy]:
    """Leading dimensions, which number matrices, where all operands have them."""
    count = view.inputs[0].dim() - 2
    leading = view.inputs[0].shape[:count]
    if any(t.shape[:count] != leading or t.dim() not in (count, count + 1, count + 2) for t in view.inputs):
        return []
    if any(out is not None and out.shape[:count] != leading for out in view.outputs if out is None or out.numel()):
        return []
    if any(out is None or out.numel() == 0 for out in view.outputs):
        return []
    return [Strategy((d,) * len(view.inputs), (d,) * len(view.outputs)) for d in range(count)]


@rule_for("_fft_r2c", "_fft_c2c", "_fft_c2r")
def transform(view: OpView) -> list[Strategy]:
    """Dimensions that are not transformed; a transform is linear."""
    rank = view.inputs[0].dim()
    own = {wrap(d, rank) for d in view.args[1]}
    linear = [Strategy((P,), (P,))] if view.inputs[0].is_floating_point() else []
    return linear + [Strategy((d,), (d,)) for d in range(rank) if d not in own]


@rule_for("_cdist_forward")
def distances(view: OpView) -> list[Strategy]:
    """(x1 [..., M, D], x2 [..., N, D]) -> [..., M, N]"""
    first, second = view.inputs
    rank = first.dim()
    if second.dim() != rank:
        return []
    found = [Strategy((d, d), (d,)) for d in range(rank - 2) if first.shape[d] == second.shape[d]]
    return [*found, Strategy((rank - 2, R), (rank - 2,)), Strategy((R, rank - 2), (rank - 1,))]


@rule_for("_cdist_backward")
def distances_backward(view: OpView) -> list[Strategy]:
    """(grad [..., M, N], x1, x2, p, distances [..., M, N]) -> grad of x1"""
    grad, first, second, _ = view.inputs
    rank = grad.dim()
    if first.dim() != rank or second.dim() != rank:
        return []
    found = [Strategy((d,) * 4, (d,)) for d in range(rank - 2) if first.shape[d] == second.shape[d]]
    return [
        *found,
        Strategy((rank - 2, rank - 2, R, rank - 2), (rank - 2,)),
        Strategy((rank - 1, R, rank - 2, rank - 1), (P,)),
    ]


@rule_for("mv")
def matrix_vector(view: OpView) -> list[Strategy]:
    return [Strategy((0, R), (0,)), Strategy((1, 0), (P,)), Strategy((P, R), (P,)), Strategy((R, P), (P,))]
