"""Copies of activations in host memory: begun when a forward ends, back on the device when its backward needs them.

On an accelerator both ways run on streams of their own, from and to pinned memory, beside compute; on a CPU they are
plain copies. What is copied are whole storages, each once, so that tensors that share memory share it again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

OUT, BACK = "out", "back"  # ways
ALIGNMENT = 512  # bytes, of each storage within a copy


class HostCopy:
    """Tensors on their way out and back. Made, which begins the copy; then let_go, load, tensors, in this order."""

    def __init__(self, host: HostMemory, tensors: Sequence[Any], others: Collection[int]) -> None:
        """tensors: anything else among them stays as it is, and so do those in the storages of `others`."""
        self.host = host
        self._tensors: list[Any] = list(tensors)
        self._layouts: dict[int, tuple[int, Any]] = {}  # place in the list -> its storage, and its layout there
        storages: dict[int, torch.UntypedStorage] = {}
        for place, tensor in enumerate(self._tensors):
            if _can_go(tensor, host.device) and (key := tensor.untyped_storage().data_ptr()) not in others:
                storages.setdefault(key, tensor.untyped_storage())
                layout = (tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())
                self._layouts[place] = key, layout
        self._sizes = {key: storage.nbytes() for key, storage in storages.items()}
        self._here: dict[int, torch.Tensor] = {}  # loaded
        self._there = host.take(sum(map(_aligned, self._sizes.values())))
        with host.beside(OUT):
            for key, part in self._parts():
                part.copy_(_as_bytes(storages[key]), non_blocking=True)
        self._copied = host.mark(OUT)

    def _parts(self) -> Iterable[tuple[int, torch.Tensor]]:
        """Of the host's memory, for each storage."""
        start = 0
        for key, size in self._sizes.items():
            yield key, self._there[start : start + size]
            start += _aligned(size)

    def wait(self) -> None:
        """What compute does from now on comes after the latest copy."""
        self.host.wait(self._copied)

    def let_go(self) -> None:
        """The device's memory may be used for something else."""
        self.wait()
        for place in self._layouts:
            self._tensors[place] = None

    def load(self) -> None:
        device = self.host.device
        self._here = {key: torch.empty(size, dtype=torch.uint8, device=device) for key, size in self._sizes.items()}
        with self.host.beside(BACK):
            for key, part in self._parts():
                self._here[key].copy_(part, non_blocking=True)
        self._copied = self.host.mark(BACK)

    def tensors(self) -> list[Any]:
        """All of them, on the device again."""
        self.wait()
        for place, (key, (dtype, *layout)) in self._layouts.items():
            empty = torch.empty(0, dtype=dtype, device=self.host.device)
            self._tensors[place] = empty.set_(self._here[key].untyped_storage(), *layout)
        self.host.give_back(self._there)
        self._here = {}
        return self._tensors

    def loaded_bytes(self) -> int:
        return sum(flat.numel() for flat in self._here.values())


class HostMemory:
    """Of one device: memory that is used again, and a stream each way."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_stream = device, device.type == "cuda"
        self._free: dict[int, list[torch.Tensor]] = {}
        self._streams: dict[str, torch.cuda.Stream] = {}

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

    def beside(self, way: str) -> AbstractContextManager[Any]:
        """Runs beside compute, after what compute has been given so far."""
        if not self.on_stream:
            return nullcontext()
        if way not in self._streams:
            self._streams[way] = torch.cuda.Stream(self.device)
        self._streams[way].wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._streams[way])

    def mark(self, way: str) -> torch.cuda.Event | None:
        return self._streams[way].record_event() if self.on_stream else None

    def wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def _can_go(tensor: Any, device: torch.device) -> bool:
    plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.device.type == device.type
    return plain and not tensor.is_conj() and not tensor.is_neg() and tensor.untyped_storage().nbytes() > 0


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
