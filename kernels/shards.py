"""Where a shard lies in its whole tensor, as runs of consecutive element indices.

A shard is a box: local_shape cut out of global_shape at offset. In row-major order of the whole it is a set of runs of
`run` consecutive indices; the first index of each run follows from at most a few outer dimensions. Fully held trailing
dimensions belong to the run, so a tensor that is not sharded, or is sharded on its first dimension, is one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..errors import ShardwrightError


@dataclass(frozen=True)
class Runs:
    """Run r of num_runs begins at start + sum(index_i * strides_i), where index is r in the outer shape, row-major."""

    start: int
    outer: tuple[int, ...]  # sizes
    strides: tuple[int, ...]  # in elements of the whole tensor
    run: int  # elements in one run
    global_numel: int

    @property
    def num_runs(self) -> int:
        return prod(self.outer)

    def starts(self, first: int, last: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64 [last - first]: where runs first..last-1 begin."""
        index = torch.arange(first, last, dtype=torch.int64, device=device)
        begin = torch.full_like(index, self.start)
        for size, stride in zip(reversed(self.outer), reversed(self.strides), strict=True):
            begin += index % size * stride
            index = index // size
        return begin

    def shift(self) -> int | None:
        """How far into a block of four indices every run begins, or None where runs differ."""
        return self.start % 4 if all(stride % 4 == 0 for stride in self.strides) else None


def runs_of(local_shape: Sequence[int], global_shape: Sequence[int], offset: Sequence[int]) -> Runs:
    """Raises ShardwrightError where the box does not lie inside the whole."""
    ranks_agree = len(local_shape) == len(global_shape) == len(offset)
    if not ranks_agree or any(
        o < 0 or o + size > whole for size, whole, o in zip(local_shape, global_shape, offset, strict=True)
    ):
        raise ShardwrightError(
            f"a shard of shape {list(local_shape)} at offset {list(offset)} does not lie inside {list(global_shape)}",
            means="the random numbers of a shard are those of its place in the whole tensor",
            change="global_shape and offset",
            works=f"global_shape={list(local_shape)}, offset={[0] * len(local_shape)} for a tensor that is not sharded",
        )
    start, stride, run = 0, 1, 1
    outer: list[int] = []
    strides: list[int] = []
    in_run = True  # every dimension to the right is held whole
    for size, whole, o in zip(reversed(local_shape), reversed(global_shape), reversed(offset), strict=True):
        start += o * stride
        if in_run:
            run *= size
        elif outer and stride == strides[0] * outer[0]:  # continues the dimension to its right, which is held whole
            outer[0] *= size
        elif size != 1:
            outer.insert(0, size)
            strides.insert(0, stride)
        in_run = in_run and size == whole
        stride *= whole
    return Runs(start, tuple(outer), tuple(strides), run, stride)
