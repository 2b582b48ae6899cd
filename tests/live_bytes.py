"""Live tensor bytes of running code, op by op: shares no code with what predicts them.

A dispatch mode sees the results of every op that torch dispatches, and holds their storages by weak references. What
exists already is found by the garbage collector. Of ops that are written in Python it sees the ops inside. Not seen:
what a compiled kernel allocates inside itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OWN = "shardwright"  # the namespace of ops whose kernels are written in Python


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a DTensor."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _is_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _is_real(tensor: torch.Tensor) -> bool:
    return _local(tensor).device.type != "meta" and type(_local(tensor)).__name__ != "FakeTensor"


class LiveBytes(TorchDispatchMode):
    """peak_bytes: the most that was alive after any op; begun_bytes: at the beginning. ignored: tensors left out.

    at_peak: sizes of the storages alive then, with the op that made each."""

    def __init__(self, ignored: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._left_out = list(ignored)
        self._ignored = {_local(tensor).untyped_storage()._cdata for tensor in self._left_out if _is_real(tensor)}
        self.peak_bytes = self.begun_bytes = 0
        self.at_peak: list[tuple[int, str]] = []
        self.peak_op = ""

    def __enter__(self) -> Any:
        for found in all_tensors():
            self._add(found, "before")
        self.begun_bytes = self._live()
        self._note("begin")
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._looking_inside(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, str(func))
        self._note(str(func))
        return result

    def _looking_inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The kernel of an op of our own runs under this mode too, where its operands lie on the CPU."""
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func.namespace != OWN or not operands or not all(type(t) is torch.Tensor and _is_cpu(t) for t in operands):
            return func(*args, **kwargs)
        super().__enter__()
        try:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def _add(self, tensor: torch.Tensor, origin: str) -> None:
        if not _is_real(tensor):
            return
        storage = _local(tensor).untyped_storage()
        if storage._cdata not in self._ignored:
            known = self._storages.get(storage._cdata)
            if known is None or known[0].expired():
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), origin)

    def _live(self) -> int:
        self._storages = {key: row for key, row in self._storages.items() if not row[0].expired()}
        return sum(size for _, size, _ in self._storages.values())

    def _note(self, op: str) -> None:
        live = self._live()
        if live > self.peak_bytes:
            self.peak_bytes, self.peak_op = live, op
            self.at_peak = [(size, origin) for _, size, origin in self._storages.values()]


def all_tensors() -> list[torch.Tensor]:
    """Whatever this process holds. Kept as a list, their memory is nobody else's."""
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


def peak_of(call: Callable[[], Any], ignored: Iterable[torch.Tensor] = ()) -> LiveBytes:
    with LiveBytes(ignored) as live:
        call()
    return live


def allocated_peak(call: Callable[[], Any]) -> int:
    """Most bytes that a call allocates on the CPU and has not freed, what kernels hold inside themselves included."""
    with torch.autograd.profiler.profile(profile_memory=True) as found:
        call()
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
