"""Cutting a batch: by microbatch, then over the data-parallel ranks.

Microbatch k is the k-th contiguous slice of the global batch; data-parallel rank r holds the r-th contiguous part of
each microbatch. With 8 samples, microbatches of 4 and two ranks:

    global   0 1 2 3 | 4 5 6 7        rank 0   0 1 | 4 5        rank 1   2 3 | 6 7

A rank's part of the batch is therefore not one contiguous slice of it. The last microbatches may be smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ShardwrightError
from .relayout import all_gather_dim
from .shards import chunk_bounds


class BatchPart(dict[str, torch.Tensor]):
    """What one data-parallel rank holds of a global batch of `global_size` samples."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], global_size: int) -> None:
        super().__init__(tensors)
        self.global_size = global_size


@dataclass(frozen=True)
class MicrobatchPart:
    """This rank's part of one microbatch. size: samples of the whole microbatch."""

    tensors: dict[str, torch.Tensor]
    size: int


def microbatch_sizes(global_size: int, microbatch_size: int, dp_size: int = 1) -> list[int]:
    """[4, 4, 2] for 10 samples in microbatches of 4.

    Where the rest does not divide over the data-parallel ranks, what is left over is a microbatch of its own that all
    of them run whole: [8, 8, 4, 1] for 21 samples in microbatches of 8 on 4 ranks.
    """
    full, rest = divmod(global_size, microbatch_size)
    left = rest % dp_size
    return [microbatch_size] * full + [size for size in (rest - left, left) if size]


def shard_batch(
    batch: Mapping[str, torch.Tensor], dims: Mapping[str, int], microbatch_size: int, dp_size: int, dp_rank: int
) -> BatchPart:
    """The part of a global batch that a data-parallel rank passes to step(). dims: of each entry that holds samples,
    the dimension that counts them. Other entries go to every rank whole."""
    global_size = _common_size(batch, dims)
    part = dict(batch)
    sizes = microbatch_sizes(global_size, microbatch_size, dp_size)
    for name, dim in dims.items():
        if name not in batch:
            continue
        rows, start = [], 0
        for size in sizes:
            low, high = chunk_bounds(size, dp_size, dp_rank)
            rows.append(batch[name].narrow(dim, start + low, high - low))
            start += size
        part[name] = rows[0] if len(rows) == 1 else torch.cat(rows, dim)
    return BatchPart(part, global_size)


def split_part(
    part: Mapping[str, torch.Tensor],
    dims: Mapping[str, int],
    microbatch_size: int,
    dp_size: int,
    dp_rank: int,
) -> list[MicrobatchPart]:
    """This rank's microbatches. A part that shard_batch did not cut counts as 1/dp_size of the global batch."""
    local_size = _common_size(part, dims)
    global_size = part.global_size if isinstance(part, BatchPart) else local_size * dp_size
    sizes = microbatch_sizes(global_size, microbatch_size, dp_size)
    bounds = [chunk_bounds(size, dp_size, dp_rank) for size in sizes]
    rows = [high - low for low, high in bounds]
    if sum(rows) != local_size:
        raise ShardwrightError(
            f"this rank has {local_size} samples where {sum(rows)} of a global batch of {global_size} belong to it",
            means="the batch was not cut as the plan cuts it",
            change="cut the global batch with program.shard_batch",
            works="program.step(program.shard_batch(global_batch))",
        )
    cut = {name: torch.split(tensor, rows, dims[name]) for name, tensor in part.items() if name in dims}
    return [
        MicrobatchPart({name: cut[name][k] if name in cut else tensor for name, tensor in part.items()}, size)
        for k, size in enumerate(sizes)
    ]


def _common_size(batch: Mapping[str, torch.Tensor], dims: Mapping[str, int]) -> int:
    sizes = {n: batch[n].shape[dim] if dim < batch[n].dim() else 0 for n, dim in dims.items() if n in batch}
    if len(set(sizes.values())) != 1:
        raise ShardwrightError(
            f"the entries of this batch have different numbers of samples: {sizes}"
            if sizes
            else f"none of {sorted(dims)} is in this batch; it has {sorted(batch)}",
            change="the batch, or batch_dims, which says along which dimension each entry holds samples",
            works="; ".join(f"samples along dimension {dim} of {name}" for name, dim in dims.items()),
        )
    return next(iter(sizes.values()))


def whole_shape(tensor: torch.Tensor, dim: int | None, size: int) -> tuple[int, ...]:
    """Of an entry that holds `size` samples along dim; its own where it holds none."""
    return tuple(size if d == dim else s for d, s in enumerate(tensor.shape))


def conform(
    name: str, tensor: torch.Tensor, expected: tuple[int, ...], whole: tuple[int, ...], dim: int, over: tuple[Any, int]
) -> torch.Tensor:
    """A batch entry as the segments want it: this rank's samples, or all of them where they are not sharded.

    whole: shape of the microbatch's entry. over: group and number of the ranks that hold a microbatch. Whether it is
    gathered depends on what every rank knows, not on how many samples this one has.
    """
    group, dp_size = over
    if dp_size > 1 and tuple(expected) == whole:
        return all_gather_dim(tensor, tuple(expected), dim, group, dp_size)
    check_shape(name, tensor, expected)
    return tensor


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ShardwrightError(
            f"batch entry {name!r} has shape {tuple(tensor.shape)} on this rank where the plan has {tuple(expected)}",
            means="the program was built for another shape",
            change="the batch, or plan for this shape",
            works=f"{name} of shape {tuple(expected)}",
        )
