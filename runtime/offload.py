"""Copies of activations in host memory: begun when a forward ends, back on the device when its backward needs them.

On an accelerator both ways run on streams of their own, from and to pinned memory, beside compute; on a CPU they are
plain copies. What is copied are whole storages, each once, so that tensors that share memory share it again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch


class HostCopy:
    """Tensors on their way out and back: begin (made), let_go, load, tensors; in this order."""

    def __init__(self, host: HostMemory, tensors: Sequence[Any], others: Collection[int]) -> None:
        """tensors: anything else among them stays as it is, and so do those in the storages of `others`."""
        self.host = host
        self._tensors: list[Any] = list(tensors)
        self._layouts: dict[int, tuple[int, Any]] = {}  # place in the list -> number of its storage, and its layout
        storages: dict[int, torch.UntypedStorage] = {}
        for place, tensor in enumerate(self._tensors):
            if _can_go(tensor) and (key := tensor.untyped_storage().data_ptr()) not in others:
                storages.setdefault(key, tensor.untyped_storage())
                layout = (tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())
                self._layouts[place] = list(storages).index(key), layout
        self._here = [_as_bytes(storage) for storage in storages.values()]
        self._there: list[torch.Tensor] = []
        with host.beside(host.out):
            for flat in self._here:
                copy = host.take(flat.numel())
                copy.copy_(flat, non_blocking=True)
                self._there.append(copy)
        self._copied = host.mark(host.out)

    def let_go(self) -> None:
        """The device's memory may be used for something else once the copy is over."""
        self.host.wait(self._copied)
        for place in self._layouts:
            self._tensors[place] = None
        self._here = []

    def load(self) -> None:
        device = self.host.device
        self._here = [torch.empty(flat.numel(), dtype=torch.uint8, device=device) for flat in self._there]
        with self.host.beside(self.host.back):
            for flat, copy in zip(self._here, self._there, strict=True):
                flat.copy_(copy, non_blocking=True)
        self._copied = self.host.mark(self.host.back)

    def tensors(self) -> list[Any]:
        """All of them, on the device again."""
        self.host.wait(self._copied)
        for place, (number, (dtype, *layout)) in self._layouts.items():
            storage = self._here[number].untyped_storage()
            self._tensors[place] = torch.empty(0, dtype=dtype, device=self.host.device).set_(storage, *layout)
        for flat in self._there:
            self.host.give_back(flat)
        self._here, self._there = [], []
        return self._tensors

    def device_bytes(self) -> int:
        return sum(flat.numel() for flat in self._here)


class HostMemory:
    """Of one device: buffers that are used again, and a stream each way."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_stream = device, device.type == "cuda"
        self._free: dict[int, list[torch.Tensor]] = {}
        self._streams: dict[str, torch.cuda.Stream] = {}
        self.out, self.back = "out", "back"

    def copy(self, tensors: Sequence[Any], others: Iterable[torch.Tensor]) -> HostCopy:
        """others: tensors whose memory stays in use."""
        return HostCopy(self, tensors, {tensor.untyped_storage().data_ptr() for tensor in others})

    def take(self, num_bytes: int) -> torch.Tensor:
        if free := self._free.get(num_bytes):
            return free.pop()
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.on_stream)

    def give_back(self, flat: torch.Tensor) -> None:
        """The next copy into it is ordered behind what still reads it: a copy out starts after compute that has waited
        for the copy back."""
        self._free.setdefault(flat.numel(), []).append(flat)

    def beside(self, way: str) -> Any:
        """Runs beside compute, after what compute has been given so far."""
        if not self.on_stream:
            return torch.no_grad()
        if way not in self._streams:
            self._streams[way] = torch.cuda.Stream(self.device)
        self._streams[way].wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._streams[way])

    def mark(self, way: str) -> torch.cuda.Event | None:
        return self._streams[way].record_event() if self.on_stream else None

    def wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def _can_go(tensor: Any) -> bool:
    plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided
    return plain and not tensor.is_conj() and not tensor.is_neg() and tensor.untyped_storage().nbytes() > 0


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
