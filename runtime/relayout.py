"""A parameter that two segments want cut over tp in different ways is stored one way and converted for the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .shards import chunk_bounds


def from_storage(
    local: torch.Tensor, shape: tuple[int, ...], have: int | None, want: int | None, group: Any, size: int, coord: int
) -> torch.Tensor:
    """local: cut on dimension `have` (None: whole). Returns it cut on `want`. shape is the whole tensor's."""
    if have == want:
        return local
    whole = local if have is None else all_gather_dim(local, shape, have, group, size)
    return whole if want is None else take_piece(whole, want, size, coord)


def grad_to_storage(
    grad: torch.Tensor,
    shape: tuple[int, ...],
    used: int | None,
    stored: int | None,
    partial: bool,
    group: Any,
    size: int,
    coord: int,
) -> torch.Tensor:
    """A gradient as a use left it (cut on `used`, or a partial sum) -> the complete one, cut on `stored`."""
    if partial:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=group)
    whole = grad if used is None else all_gather_dim(grad, shape, used, group, size)
    return whole if stored is None else take_piece(whole, stored, size, coord)


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
