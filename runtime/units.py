"""A unit: parameters that are gathered and reduced together, in one collective each.

Whole units keep every parameter whole over the data-parallel ranks (ZeRO-0, frozen parameters, a single such rank);
units that ZeRO cuts are in sharded.py. "Whole" means whole over these: over tensor axes they are cut as the segments
want them.

Where optimizer state is in host memory, so are the masters. Gradients that no other rank adds to leave the device after
each microbatch, others once they are summed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..costmodel.communication import bucket_bytes
from ..passes.gradients import Into
from . import collectives
from .host_link import HostGradients, HostLink


class Unit:
    """names share dtypes. shapes: of the tensors inside the segments, cut over tensor axes, whole over data ones.
    link: to the host, where the optimizer's copies are there."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        master_dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        device: torch.device,
        link: HostLink | None = None,
    ) -> None:
        self.shapes = dict(shapes)
        self.names = tuple(shapes)
        self.dtype, self.master_dtype, self.reduce_dtype = dtype, master_dtype, reduce_dtype
        self.device, self.link = device, link
        self.on_host = HostGradients(link, reduce_dtype) if link is not None else None
        self.has_copies = link is not None or master_dtype != dtype  # of the parameters, for the optimizer
        self.masters: dict[str, torch.Tensor] = {}  # what the optimizer steps over, on this rank
        self.expects_grads = False

    def _make_masters(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        place = self.device if self.link is None else torch.device("cpu")
        return {name: torch.empty(shape, dtype=self.master_dtype, device=place) for name, shape in shapes.items()}

    def _write(self, target: torch.Tensor, master: torch.Tensor) -> None:
        """An optimizer's copy to where it is computed with."""
        if self.link is None:
            target.copy_(master)
        else:
            self.link.send(master, target)

    def _masters_here(self) -> list[torch.Tensor]:
        """Copies that take memory of the device."""
        return list(self.masters.values()) if self.has_copies and self.link is None else []

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

    def memory_for(self, name: str) -> Into | None:
        """Where a gradient may be written, or added to what is there; add_grad() then gets that very tensor."""
        return None

    def flush(self) -> None:
        """All contributions of one microbatch on one stage are in."""

    def start_reduce(self) -> None:
        """All contributions of the step are in."""

    def finish_reduce(self) -> dict[str, torch.Tensor]:
        """Summed over the ranks of one stage, laid out as `masters`, in any floating dtype. The unit keeps nothing.

        In host memory they are complete once the link has settled."""
        raise NotImplementedError

    def refresh(self) -> collectives.Sequence:
        """The masters have new values: bring them into the compute tensors."""
        raise NotImplementedError

    def param_bytes(self) -> int:
        """Parameters and masters that the device holds between steps."""
        raise NotImplementedError

    def grad_bytes(self) -> int:
        return 0

    def host_bytes(self) -> int:
        """Masters and gradients in host memory."""
        if self.on_host is None:
            return 0
        return self.on_host.num_bytes() + sum(t.numel() * t.element_size() for t in self.masters.values())


class WholeUnit(Unit):
    def __init__(
        self, *args: Any, existing: Mapping[str, torch.Tensor] | None = None, sum_group: Any = None, **kwargs: Any
    ):
        """existing: tensors to use as storage, for a model that already has its values on this device. sum_group: of
        the ranks that add up their gradients; None: nothing to sum."""
        super().__init__(*args, **kwargs)
        self.sum_group, self.sums = sum_group, sum_group is not None
        existing = existing or {}
        self.compute = {
            name: existing[name] if name in existing else torch.empty(shape, dtype=self.dtype, device=self.device)
            for name, shape in self.shapes.items()
        }
        self.masters = self._make_masters(self.shapes) if self.has_copies else self.compute
        self._grads: dict[str, torch.Tensor] = {}
        self._owned: set[str] = set()  # accumulators that alias nothing, so that they may be added to in place
        self._flat: torch.Tensor | None = None
        self._views: dict[str, torch.Tensor] = {}
        self._work: Any = None

    def open(self) -> Mapping[str, torch.Tensor]:
        return self.compute

    def memory_for(self, name: str) -> Into | None:
        if self.reduce_dtype != self.dtype:
            return None
        written = name in self._owned
        self._owned.add(name)
        if self.sums:
            self._make_flat()
            return self._views[name], written
        if name in self._grads and not written:
            self._grads[name] = self._grads[name].clone()  # it may share memory with another gradient
            return self._grads[name], True
        if not written:
            self._grads[name] = torch.empty(self.shapes[name], dtype=self.dtype, device=self.device)
        return self._grads[name], written

    def add_grad(self, name: str, grad: torch.Tensor | None) -> None:
        if self.sums:
            self._add_flat(name, grad)
        elif grad is not None:
            held = self._grads.get(name)
            if held is grad:
                return  # written there by the backward
            if held is None:
                self._grads[name] = grad  # may share memory with another gradient: never written to
            elif name in self._owned:
                held.add_(grad)
            else:
                self._grads[name] = held.to(self.reduce_dtype) + grad
                self._owned.add(name)

    def _make_flat(self) -> None:
        if self._flat is None:
            sizes = [self.compute[n].numel() for n in self.names]
            self._flat = torch.empty(sum(sizes), dtype=self.reduce_dtype, device=self.device)
            pieces = torch.split(self._flat, sizes)
            self._views = {n: piece.view(self.shapes[n]) for n, piece in zip(self.names, pieces, strict=True)}

    def _add_flat(self, name: str, grad: torch.Tensor | None) -> None:
        self._make_flat()
        if grad is None or grad is self._views[name]:
            return
        if name in self._owned:
            self._views[name].add_(grad)
        else:
            self._views[name].copy_(grad)
            self._owned.add(name)

    def flush(self) -> None:
        if self.on_host is not None and not self.sums:
            for name, grad in self._grads.items():
                self.on_host.add(name, grad)
            self._grads, self._owned = {}, set()

    def start_reduce(self) -> None:
        if not self.sums or not self.expects_grads:
            return
        if self._flat is None:
            self._add_flat(self.names[0], None)
        assert self._flat is not None
        for name in self.names:
            if name not in self._owned:
                self._views[name].zero_()
        self._work = dist.all_reduce(self._flat, group=self.sum_group, async_op=True)

    def finish_reduce(self) -> dict[str, torch.Tensor]:
        if self._work is not None:
            self._work.wait()
        if self.on_host is not None:
            self.flush()
            for name, view in self._views.items():
                self.on_host.add(name, view)
            grads = self.on_host.take()
        else:
            grads = dict(self._views) if self.sums else _without_aliases(self._grads, self._owned)
        self._grads, self._views, self._owned, self._flat, self._work = {}, {}, set(), None, None
        return grads

    def refresh(self) -> collectives.Sequence:
        if self.has_copies:
            for name in self.names:
                self._write(self.compute[name], self.masters[name])
        yield from ()

    def param_bytes(self) -> int:
        tensors = [*self.compute.values(), *self._masters_here()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def grad_bytes(self) -> int:
        if self._flat is not None:
            return self._flat.numel() * self._flat.element_size()
        return sum(t.numel() * t.element_size() for t in self._grads.values())


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


def merge_units(
    groups: Sequence[list[str]],
    users: Mapping[str, Collection[int]],
    kinds: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> list[list[str]]:
    """Groups whose gradients are complete one after the other become one, up to a bucket. sizes: in bytes.

    The backward goes through the instances in reverse, so a group is complete after the first instance that uses it.
    """
    most = bucket_bytes(sum(sizes.values()))
    merged: list[list[str]] = []
    last: dict[Any, list[str]] = {}  # of each kind, the group that is being filled
    for group in sorted(groups, key=lambda group: min(users.get(group[0], ()), default=0), reverse=True):
        kind = kinds[group[0]]
        open_group = last.get(kind)
        if open_group is None or sum(sizes[name] for name in (*open_group, *group)) > most:
            last[kind] = list(group)
            merged.append(last[kind])
        else:
            open_group += group
    return merged
