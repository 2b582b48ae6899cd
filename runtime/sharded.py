"""A unit whose optimizer state, gradients or parameters are cut over data-parallel ranks.

ZeRO (Rajbhandari et al., arXiv:1910.02054): stage 1 cuts the optimizer's copy, stage 2 the gradients too, stage 3 the
parameters too; each over its own extent (runtime/extents.py). Dimension 0 of each tensor is cut by the first level, its
pieces by the second, and so on; a scalar stays whole on every rank.

    level            0            1 ...          copies
    parameters       gathered before each use by the levels that cut them
    gradients        scattered over the levels that cut them after each microbatch; over the other levels, and summed
                     over the copies, once a step
    optimizer state  cut by all levels; its new values are gathered over the levels that do not cut parameters

Where optimizer state is in host memory, a rank's part of the gradients goes there: after each microbatch where the
scatter leaves it complete, else once a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import collectives
from .collectives import Pending, start_all_gather, start_reduce_scatter
from .extents import Level
from .shards import ShardLayout, cut_bounds
from .units import Unit

_BLOCK = "block"  # of all names together


class ShardedUnit(Unit):
    """levels: that cut the optimizer's copy. cut_params, cut_grads: how many of them cut parameters and gradients.
    sum_group: of the ranks on other axes that add up their gradients, once a step."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        levels: Sequence[Level],
        cut_params: int,
        cut_grads: int,
        copies: Level,
        pending: Pending,
        sum_group: Any = None,
        **common: Any,
    ) -> None:
        super().__init__(shapes, **common)
        assert cut_params <= min(1, cut_grads) and cut_grads <= len(levels), (cut_params, cut_grads, levels)
        self.levels, self.cut_params, self.cut_grads = tuple(levels), cut_params, cut_grads
        self.copies, self.pending, self.sum_group = copies, pending, sum_group
        self.layouts: list[ShardLayout] = []
        pieces = self.shapes
        for level in levels:
            self.layouts.append(ShardLayout(pieces, level.size, level.index))
            pieces = self.layouts[-1].own_shapes()
        self.compute: dict[str, torch.Tensor] = {}  # whole tensors, while they stand
        self._block: torch.Tensor | None = None  # where parameters are cut: this rank's part
        if cut_params:
            self._block = self._empty(self.layouts[0].block_elements, self.dtype).zero_()
            held = {name: self.layouts[0].shard(self._block, name) for name in self.names}
        else:
            held = self.compute = {name: self._empty(shape, self.dtype) for name, shape in self.shapes.items()}
        if self.has_copies:
            self.masters = self._make_masters(pieces)
        else:  # the optimizer's copy is a part of what is held
            self.masters = {name: self._own_rows(tensor) for name, tensor in held.items()}
        complete = cut_grads == len(self.levels) and copies.size == 1 and sum_group is None
        self._leaves_early = self.on_host is not None and complete
        self._users = 0
        self._gathering: tuple[Any, torch.Tensor] | None = None
        self._packed: torch.Tensor | None = None
        self._written: set[str] = set()
        self._scattered = False
        self._sum: torch.Tensor | None = None

    def _empty(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _own_rows(self, held: torch.Tensor) -> torch.Tensor:
        if not held.dim():
            return held
        start, stop = cut_bounds(held.shape[0], [(level.size, level.index) for level in self.levels[self.cut_params :]])
        return held[start:stop]

    def _gather(self, block: torch.Tensor, k: int) -> tuple[Any, torch.Tensor]:
        buffer = self._empty(self.levels[k].size * block.numel(), block.dtype)
        return start_all_gather(buffer, block, self.levels[k].group), buffer

    # parameters

    def prefetch(self) -> None:
        if self._block is not None and not self._users and self._gathering is None:
            self._gathering = self._gather(self._block, 0)

    def open(self) -> Mapping[str, torch.Tensor]:
        if self._block is None:
            return self.compute
        if not self._users:
            self.prefetch()
            assert self._gathering is not None
            work, buffer = self._gathering
            self._gathering = None
            work.wait()
            self.compute = {name: self.layouts[0].unpack(buffer, name) for name in self.names}
        self._users += 1
        return self.compute

    def close(self) -> None:
        if self._block is not None:
            self._users -= 1
            if not self._users:
                self.compute = {}

    def open_tensors(self) -> Mapping[str, torch.Tensor]:
        return {} if self._block is None else self.compute

    def refresh(self) -> collectives.Sequence:
        pieces = self.masters
        for k in reversed(range(self.cut_params, len(self.levels))):
            layout = self.layouts[k]
            block = self._empty(layout.block_elements, self.dtype)
            for name in self.names:
                if k == len(self.levels) - 1:
                    self._write(layout.shard(block, name), pieces[name])
                else:
                    layout.shard(block, name).copy_(pieces[name])
            if self.link is not None:
                self.link.arrive()
            work, buffer = self._gather(block, k)
            yield work, (block, buffer)
            targets = self._held(k)
            pieces = {name: layout.unpack(buffer, name, out=targets.get(name)) for name in self.names}
        if self.cut_params == len(self.levels) and self.has_copies:
            for name, target in self._held(self.cut_params).items():
                self._write(target, self.masters[name])

    def _held(self, k: int) -> Mapping[str, torch.Tensor]:
        """What this rank keeps between steps as the first k levels cut it, where it keeps that."""
        if k != self.cut_params:
            return {}
        if self._block is None:
            return self.compute
        return {name: self.layouts[0].shard(self._block, name) for name in self.names}

    # gradients

    def add_grad(self, name: str, grad: torch.Tensor | None) -> None:
        if self._packed is None:
            self._packed = self._empty(self.levels[0].size * self.layouts[0].block_elements, self.reduce_dtype)
        if grad is not None:
            self.layouts[0].pack(self._packed, name, grad, add=name in self._written)
            self._written.add(name)

    def flush(self) -> None:
        if self.cut_grads and self._packed is not None:
            self.pending.start(self._reduce(last=False))

    def start_reduce(self) -> None:
        if not self.expects_grads:
            return
        if self._packed is None and not self._scattered:
            self.add_grad(self.names[0], None)  # nothing came, but the other ranks wait for this one
        self.pending.start(self._reduce(last=True))

    def _take_packed(self) -> torch.Tensor | None:
        packed, self._packed = self._packed, None
        if packed is not None:
            for name in self.names:
                if name not in self._written:
                    self.layouts[0].zero(packed, name)
        self._written = set()
        return packed

    def _reduce(self, *, last: bool) -> collectives.Sequence:
        packed, done = self._take_packed(), 0
        if self.cut_grads:
            if packed is not None:
                self._scattered, done = True, self.cut_grads
                block = yield from self._scatter(packed, 0, done)
                if self._leaves_early:
                    assert self.on_host is not None
                    self.on_host.add(_BLOCK, block)
                else:
                    self._sum = block if self._sum is None else self._sum.add_(block)
            if not last or self._leaves_early:
                return
            done = self.cut_grads
            assert self._sum is not None
            block = self._sum
            packed = self._repack(block, done) if done < len(self.levels) else None
        if done < len(self.levels):
            assert packed is not None
            block = yield from self._scatter(packed, done, len(self.levels))
        if self.copies.size > 1:
            yield dist.all_reduce(block, group=self.copies.group, async_op=True), (block,)
        if self.sum_group is not None:
            yield dist.all_reduce(block, group=self.sum_group, async_op=True), (block,)
        self._sum = block

    def _scatter(self, packed: torch.Tensor, start: int, stop: int) -> collectives.SequenceOf[torch.Tensor]:
        """From whole pieces of level `start` to this rank's block behind level stop - 1."""
        block = packed
        for k in range(start, stop):
            packed = self._repack(block, k) if k > start else packed
            block = self._empty(self.layouts[k].block_elements, packed.dtype)
            yield start_reduce_scatter(block, packed, self.levels[k].group), (packed, block)
        return block

    def _repack(self, block: torch.Tensor, k: int) -> torch.Tensor:
        """The block that level k - 1 left, laid out in the blocks of level k."""
        packed = self._empty(self.levels[k].size * self.layouts[k].block_elements, block.dtype)
        for name in self.names:
            self.layouts[k].pack(packed, name, self.layouts[k - 1].shard(block, name), add=False)
        return packed

    def finish_reduce(self) -> dict[str, torch.Tensor]:
        self.pending.drain()
        total, self._sum, self._scattered = self._sum, None, False
        if self.on_host is not None:
            if total is not None:
                self.on_host.add(_BLOCK, total)
            total = self.on_host.take().get(_BLOCK)
        return {} if total is None else {name: self.layouts[-1].shard(total, name) for name in self.names}

    # bytes

    def param_bytes(self) -> int:
        held = [*self.compute.values()] if self._block is None else [self._block]
        held += self._masters_here()
        return sum(t.numel() * t.element_size() for t in held)

    def grad_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._packed, self._sum) if t is not None)
