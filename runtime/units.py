"""A unit: parameters that are gathered and reduced together, in one collective each.

Whole units keep every parameter whole over dp (ZeRO-0, frozen parameters, a single data-parallel rank). Sharded units
follow ZeRO (Rajbhandari et al., arXiv:1910.02054): stage 1 shards the optimizer's copy, stage 2 the gradients too,
stage 3 the parameters too. "Whole" means whole over dp: over tp they are cut as the segments want them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ._torch import all_gather_flat, reduce_scatter_flat
from .shards import ShardLayout, chunk_bounds

MAX_PENDING = 2  # reduce-scatters in flight on a rank; each holds a flat buffer of a whole unit


class Unit:
    """names share dtypes. shapes: of the tensors inside the segments, cut over tp, whole over dp."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        master_dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        device: torch.device,
        dp_group: Any,
        dp_size: int,
        dp_rank: int,
    ) -> None:
        self.shapes = dict(shapes)
        self.names = tuple(shapes)
        self.dtype, self.master_dtype, self.reduce_dtype = dtype, master_dtype, reduce_dtype
        self.device = device
        self.dp_group, self.dp_size, self.dp_rank = dp_group, dp_size, dp_rank
        self.masters: dict[str, torch.Tensor] = {}  # what the optimizer steps over, on this rank
        self.expects_grads = False

    def _empty_master(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self.master_dtype, device=self.device)

    def prefetch(self) -> None:
        """Start gathering; never blocks."""

    def open(self) -> Mapping[str, torch.Tensor]:
        """The whole tensors, in compute dtype, until close()."""
        raise NotImplementedError

    def close(self) -> None:
        pass

    def open_tensors(self) -> Mapping[str, torch.Tensor]:
        """Gathered tensors that will be freed again."""
        return {}

    def add_grad(self, name: str, grad: torch.Tensor | None) -> None:
        """Add one contribution; None counts as zero. Gradients lie as in `shapes`."""
        raise NotImplementedError

    def flush(self) -> None:
        """All contributions of one microbatch on one stage are in."""

    def start_reduce(self) -> None:
        """All contributions of the step are in."""

    def finish_reduce(self) -> dict[str, torch.Tensor]:
        """Summed over dp, laid out as `masters`, in any floating dtype. The unit keeps nothing."""
        raise NotImplementedError

    def start_refresh(self) -> None:
        """The masters have new values: bring them into the compute tensors."""

    def finish_refresh(self) -> None:
        pass

    def param_bytes(self) -> int:
        """Parameters and masters held between steps."""
        raise NotImplementedError

    def grad_bytes(self) -> int:
        return 0


class WholeUnit(Unit):
    def __init__(
        self, *args: Any, existing: Mapping[str, torch.Tensor] | None = None, sum_over_dp: bool, **kwargs: Any
    ):
        """existing: tensors to use as storage, for a model that already has its values on this device."""
        super().__init__(*args, **kwargs)
        self.sum_over_dp = sum_over_dp and self.dp_size > 1
        existing = existing or {}
        self.compute = {
            name: existing[name] if name in existing else torch.empty(shape, dtype=self.dtype, device=self.device)
            for name, shape in self.shapes.items()
        }
        if self.master_dtype == self.dtype:
            self.masters = self.compute
        else:
            self.masters = {n: self._empty_master(shape) for n, shape in self.shapes.items()}
        self._grads: dict[str, torch.Tensor] = {}
        self._owned: set[str] = set()  # accumulators that alias nothing, so that they may be added to in place
        self._flat: torch.Tensor | None = None
        self._views: dict[str, torch.Tensor] = {}
        self._work: Any = None

    def open(self) -> Mapping[str, torch.Tensor]:
        return self.compute

    def add_grad(self, name: str, grad: torch.Tensor | None) -> None:
        if self.sum_over_dp:
            self._add_flat(name, grad)
        elif grad is not None:
            held = self._grads.get(name)
            if held is None:
                self._grads[name] = grad  # may share memory with another gradient: never written to
            elif name in self._owned:
                held.add_(grad)
            else:
                self._grads[name] = held.to(self.reduce_dtype) + grad
                self._owned.add(name)

    def _add_flat(self, name: str, grad: torch.Tensor | None) -> None:
        if self._flat is None:
            sizes = [self.compute[n].numel() for n in self.names]
            self._flat = torch.empty(sum(sizes), dtype=self.reduce_dtype, device=self.device)
            pieces = torch.split(self._flat, sizes)
            self._views = {n: piece.view(self.shapes[n]) for n, piece in zip(self.names, pieces, strict=True)}
        if grad is None:
            return
        if name in self._owned:
            self._views[name].add_(grad)
        else:
            self._views[name].copy_(grad)
            self._owned.add(name)

    def start_reduce(self) -> None:
        if not self.sum_over_dp or not self.expects_grads:
            return
        if self._flat is None:
            self._add_flat(self.names[0], None)
        assert self._flat is not None
        for name in self.names:
            if name not in self._owned:
                self._views[name].zero_()
        self._work = dist.all_reduce(self._flat, group=self.dp_group, async_op=True)

    def finish_reduce(self) -> dict[str, torch.Tensor]:
        if self._work is not None:
            self._work.wait()
        grads = dict(self._views) if self.sum_over_dp else _without_aliases(self._grads, self._owned)
        self._grads, self._views, self._owned, self._flat, self._work = {}, {}, set(), None, None
        return grads

    def start_refresh(self) -> None:
        if self.masters is not self.compute:
            for name in self.names:
                self.compute[name].copy_(self.masters[name])

    def param_bytes(self) -> int:
        tensors = [*self.compute.values(), *(self.masters.values() if self.masters is not self.compute else ())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def grad_bytes(self) -> int:
        if self._flat is not None:
            return self._flat.numel() * self._flat.element_size()
        return sum(t.numel() * t.element_size() for t in self._grads.values())


class ReduceQueue:
    """Reduce-scatters under way, of all units of a rank: oldest first, few at a time, because each holds its input."""

    def __init__(self) -> None:
        self._pending: list[tuple[ShardedUnit, Any, torch.Tensor, torch.Tensor]] = []

    def push(self, unit: ShardedUnit, work: Any, out: torch.Tensor, packed: torch.Tensor) -> None:
        self._pending.append((unit, work, out, packed))
        self.drain(MAX_PENDING)

    def drain(self, leave: int = 0) -> None:
        while len(self._pending) > leave:
            unit, work, out, _ = self._pending.pop(0)
            work.wait()
            unit.add_shard(out)

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, _, out, packed in self._pending for t in (out, packed))


class ShardedUnit(Unit):
    """zero: 1, 2 or 3. Dimension 0 of each tensor is cut over dp; a scalar stays whole on every rank."""

    def __init__(self, *args: Any, zero: int, queue: ReduceQueue, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.zero, self.queue = zero, queue
        self.layout = ShardLayout(self.shapes, self.dp_size, self.dp_rank)
        self.compute: dict[str, torch.Tensor] = {}
        self._block: torch.Tensor | None = None
        same = self.master_dtype == self.dtype
        if zero == 3:
            self._block = torch.zeros(self.layout.block_elements, dtype=self.dtype, device=self.device)
            if same:
                self.masters = {name: self.layout.shard(self._block, name) for name in self.names}
        else:
            self.compute = {n: torch.empty(s, dtype=self.dtype, device=self.device) for n, s in self.shapes.items()}
            if same:  # this rank's rows of the compute tensor are the optimizer's copy
                self.masters = {name: self._own_rows(self.compute[name]) for name in self.names}
        if not same:
            self.masters = {n: self._empty_master(self._own_shape(n)) for n in self.names}
        self._users = 0
        self._gathering: tuple[Any, torch.Tensor] | None = None
        self._packed: torch.Tensor | None = None
        self._written: set[str] = set()
        self._scattered = False
        self._sum: torch.Tensor | None = None
        self._refreshing: tuple[Any, torch.Tensor] | None = None

    def _own_rows(self, whole: torch.Tensor) -> torch.Tensor:
        if not whole.dim():
            return whole
        start, stop = chunk_bounds(whole.shape[0], self.dp_size, self.dp_rank)
        return whole[start:stop]

    def _own_shape(self, name: str) -> tuple[int, ...]:
        shape = self.shapes[name]
        if not shape:
            return shape
        start, stop = chunk_bounds(shape[0], self.dp_size, self.dp_rank)
        return (stop - start, *shape[1:])

    # parameters

    def prefetch(self) -> None:
        if self.zero == 3 and not self._users and self._gathering is None:
            assert self._block is not None
            buffer = torch.empty(self.dp_size * self.layout.block_elements, dtype=self.dtype, device=self.device)
            self._gathering = (all_gather_flat(buffer, self._block, group=self.dp_group, async_op=True), buffer)

    def open(self) -> Mapping[str, torch.Tensor]:
        if self.zero < 3:
            return self.compute
        if not self._users:
            self.prefetch()
            assert self._gathering is not None
            work, buffer = self._gathering
            self._gathering = None
            work.wait()
            self.compute = {name: self.layout.unpack(buffer, name) for name in self.names}
        self._users += 1
        return self.compute

    def close(self) -> None:
        if self.zero == 3:
            self._users -= 1
            if not self._users:
                self.compute = {}

    def open_tensors(self) -> Mapping[str, torch.Tensor]:
        return self.compute if self.zero == 3 else {}

    def start_refresh(self) -> None:
        same = self.master_dtype == self.dtype
        if self.zero == 3:
            if not same:
                assert self._block is not None
                for name in self.names:
                    self.layout.shard(self._block, name).copy_(self.masters[name])
            return
        block = torch.zeros(self.layout.block_elements, dtype=self.dtype, device=self.device)
        for name in self.names:
            self.layout.shard(block, name).copy_(self.masters[name])
        buffer = torch.empty(self.dp_size * self.layout.block_elements, dtype=self.dtype, device=self.device)
        self._refreshing = (all_gather_flat(buffer, block, group=self.dp_group, async_op=True), buffer)

    def finish_refresh(self) -> None:
        if self._refreshing is not None:
            work, buffer = self._refreshing
            self._refreshing = None
            work.wait()
            for name in self.names:
                self.layout.unpack(buffer, name, out=self.compute[name])

    # gradients

    def add_grad(self, name: str, grad: torch.Tensor | None) -> None:
        if self._packed is None:
            elements = self.dp_size * self.layout.block_elements
            self._packed = torch.zeros(elements, dtype=self.reduce_dtype, device=self.device)
        if grad is not None:
            self.layout.pack(self._packed, name, grad, add=name in self._written)
            self._written.add(name)

    def flush(self) -> None:
        if self.zero >= 2 and self._packed is not None:
            self._scatter()

    def start_reduce(self) -> None:
        if self.expects_grads and (self._packed is not None or not self._scattered):
            self.add_grad(self.names[0], None)
            self._scatter()

    def _scatter(self) -> None:
        assert self._packed is not None
        out = torch.empty(self.layout.block_elements, dtype=self.reduce_dtype, device=self.device)
        work = reduce_scatter_flat(out, self._packed, group=self.dp_group, async_op=True)
        packed, self._packed, self._written, self._scattered = self._packed, None, set(), True
        self.queue.push(self, work, out, packed)

    def add_shard(self, out: torch.Tensor) -> None:
        self._sum = out if self._sum is None else self._sum.add_(out)

    def finish_reduce(self) -> dict[str, torch.Tensor]:
        self.queue.drain()
        total, self._sum, self._scattered = self._sum, None, False
        return {} if total is None else {name: self.layout.shard(total, name) for name in self.names}

    def param_bytes(self) -> int:
        held = sum(t.numel() * t.element_size() for t in self.compute.values()) if self.zero < 3 else 0
        if self._block is not None:
            held += self._block.numel() * self._block.element_size()
        if self.master_dtype != self.dtype:
            held += sum(t.numel() * t.element_size() for t in self.masters.values())
        return held

    def grad_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._packed, self._sum) if t is not None)


def _without_aliases(grads: Mapping[str, torch.Tensor], owned: set[str]) -> dict[str, torch.Tensor]:
    """A backward may return one tensor as two gradients, or an expanded one: what users write to must be its own."""
    seen: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for name, grad in grads.items():
        if name not in owned:
            place = grad.untyped_storage().data_ptr()
            if place in seen or grad.numel() * grad.element_size() != grad.untyped_storage().nbytes():
                grad = grad.clone(memory_format=torch.contiguous_format)
            seen.add(place)
        result[name] = grad
    return result


def unit_names(names: Sequence[str], users: Mapping[str, Collection[int]], kinds: Mapping[str, Any]) -> list[list[str]]:
    """Group parameters that the same instances use and that are of one kind (dtypes, sharding)."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault((tuple(sorted(users.get(name, ()))), kinds[name]), []).append(name)
    return list(groups.values())
