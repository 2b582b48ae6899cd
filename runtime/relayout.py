"""A parameter that two segments want cut in different ways is stored one way and converted for the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .mesh import RankGrid
from .shards import DimCut, chunk_bounds, narrow_shape
from .specs import Cuts, ParamUse


def dim_cuts(cuts: Cuts, grid: RankGrid) -> list[DimCut]:
    """This rank's piece of each cut."""
    return [(dim, (grid.size(axis), grid.coord(axis))) for axis, dim in cuts]


def changed_axes(have: Cuts, want: Cuts) -> tuple[str, ...]:
    """The axes that cut one way or the other, behind those at the front that both have alike."""
    same = _alike(have, want)
    return tuple(dict.fromkeys(axis for axis, _ in (*have[same:], *want[same:])))


def _alike(have: Cuts, want: Cuts) -> int:
    return next((k for k, (a, b) in enumerate(zip(have, want, strict=False)) if a != b), min(len(have), len(want)))


def relaid(local: torch.Tensor, shape: tuple[int, ...], have: Cuts, want: Cuts, grid: RankGrid) -> torch.Tensor:
    """local: a piece of a tensor of this shape, cut as `have` says. Returns it cut as `want` says: made whole on what
    the two do not begin with alike, the last cut first, and cut again."""
    if have == want:
        return local
    same = _alike(have, want)
    for k in reversed(range(same, len(have))):
        axis, dim = have[k]
        whole = narrow_shape(shape, dim_cuts(have[:k], grid))
        local = all_gather_dim(local, whole, dim, grid.group(axis), grid.size(axis))
    for axis, dim in want[same:]:
        local = take_piece(local, dim, grid.size(axis), grid.coord(axis))
    return local


def grad_to_storage(
    grad: torch.Tensor, shape: tuple[int, ...], use: ParamUse, stored: Cuts, grid: RankGrid
) -> torch.Tensor:
    """A gradient as a use left it (cut, or a partial sum) -> cut as it is stored, complete on the axes that differ."""
    partial = [axis for axis in changed_axes(use.cuts, stored) if axis in use.partial_axes]
    if partial:
        grad = grad.contiguous().clone()
    for axis in partial:
        dist.all_reduce(grad, group=grid.group(axis))
    return relaid(grad, shape, use.cuts, stored, grid)


def take_piece(whole: torch.Tensor, dim: int, size: int, coord: int) -> torch.Tensor:
    start, stop = chunk_bounds(whole.shape[dim], size, coord)
    return whole.narrow(dim, start, stop - start).contiguous()


def all_gather_dim(local: torch.Tensor, shape: tuple[int, ...], dim: int, group: Any, size: int) -> torch.Tensor:
    """Whole tensor of this shape from pieces that torch.chunk would cut on `dim`; pieces may be uneven or empty."""
    widest = -(-shape[dim] // size)
    padded_shape = [*shape[:dim], widest, *shape[dim + 1 :]]
    padded = local.new_zeros(padded_shape)
    padded.narrow(dim, 0, local.shape[dim]).copy_(local)
    pieces = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat(pieces, dim).narrow(dim, 0, shape[dim])
