"""Copies between a device and ordinary host memory, through pinned buffers that are used in turn.

Memory of the host that holds a model's optimizer state is too much to pin. What goes there or comes from there passes
through a few buffers instead, in chunks:

    to the host      device --stream--> buffer --host--> where it is kept, or added to what is kept there
    to the device    where it is kept --host, cast--> buffer --stream--> device

Either way runs beside compute. The host's part of a chunk that comes down is done when its buffer is wanted again, and
at the latest in settle(): by then the chunk has mostly arrived, so the host does not wait. On a CPU the copies are
plain ones, and everything else is the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from .offload import BACK, OUT, HostMemory

CHUNK_BYTES = 1 << 26  # torch's pinned allocator rounds up to powers of two
NUM_BUFFERS = 4  # each way


@dataclass
class _Arriving:
    """A chunk on its way to the host. source: kept until it has been read."""

    copied: Any
    buffer: torch.Tensor
    staged: torch.Tensor
    target: torch.Tensor
    add: bool
    source: torch.Tensor


class HostLink:
    """One device's link to its host."""

    def __init__(self, memory: HostMemory, *, chunk_bytes: int = CHUNK_BYTES, num_buffers: int = NUM_BUFFERS) -> None:
        self.memory, self.chunk_bytes, self.num_buffers = memory, chunk_bytes, num_buffers
        self._arriving: deque[_Arriving] = deque()
        self._leaving: deque[tuple[Any, torch.Tensor]] = deque()  # copied, buffer
        self._sent: Any = None

    def bring(self, source: torch.Tensor, target: torch.Tensor, *, add: bool) -> None:
        """Begin to copy a tensor of the device into one of the host, contiguous, or to add it to what is there."""
        flat, held = source.reshape(-1), target.view(-1)
        size = max(1, self.chunk_bytes // flat.element_size())
        for start in range(0, flat.numel(), size):
            chunk = flat[start : start + size]
            if len(self._arriving) >= self.num_buffers:
                self._take_in()
            buffer = self.memory.take(self.chunk_bytes)
            staged = buffer[: chunk.numel() * chunk.element_size()].view(chunk.dtype)
            with self.memory.beside(OUT):
                staged.copy_(chunk, non_blocking=True)
            copied = self.memory.mark(OUT)
            self._arriving.append(_Arriving(copied, buffer, staged, held[start : start + size], add, chunk))

    def _take_in(self) -> None:
        chunk = self._arriving.popleft()
        if chunk.copied is not None:
            chunk.copied.synchronize()
        if chunk.add:
            chunk.target.add_(chunk.staged)
        else:
            chunk.target.copy_(chunk.staged)
        self.memory.give_back(chunk.buffer)

    def settle(self) -> None:
        """All that was brought is where it belongs."""
        while self._arriving:
            self._take_in()

    def send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy a tensor of the host into one of the device, in the device's dtype. arrive() comes before
        anything reads it."""
        if not target.is_contiguous():
            target.copy_(source)
            return
        held, flat = source.reshape(-1), target.view(-1)
        size = max(1, self.chunk_bytes // flat.element_size())
        for start in range(0, flat.numel(), size):
            chunk = flat[start : start + size]
            buffer = self._next_leaving()
            staged = buffer[: chunk.numel() * chunk.element_size()].view(chunk.dtype)
            staged.copy_(held[start : start + size])
            with self.memory.beside(BACK):
                chunk.copy_(staged, non_blocking=True)
            self._sent = self.memory.mark(BACK)
            self._leaving.append((self._sent, buffer))

    def _next_leaving(self) -> torch.Tensor:
        """A buffer that no copy reads any more."""
        if len(self._leaving) < self.num_buffers:
            return self.memory.take(self.chunk_bytes)
        copied, buffer = self._leaving.popleft()
        if copied is not None:
            copied.synchronize()
        return buffer

    def arrive(self) -> None:
        """What compute does from now on comes after all that was sent."""
        self.memory.wait(self._sent)

    def num_bytes(self) -> int:
        """Of the device, held by what is on its way to the host."""
        return sum(chunk.source.numel() * chunk.source.element_size() for chunk in self._arriving)


class HostGradients:
    """Gradients added up in host memory, in memory that each step uses again."""

    def __init__(self, link: HostLink, dtype: torch.dtype) -> None:
        self.link, self.dtype = link, dtype
        self._held: dict[str, torch.Tensor] = {}
        self._written: set[str] = set()

    def add(self, name: str, grad: torch.Tensor) -> None:
        if name not in self._held:
            self._held[name] = torch.empty(grad.shape, dtype=self.dtype)
        self.link.bring(grad, self._held[name], add=name in self._written)
        self._written.add(name)

    def take(self) -> dict[str, torch.Tensor]:
        """What was added since the last time; there once the link has settled. The next step writes to the same
        memory."""
        written, self._written = self._written, set()
        return {name: held for name, held in self._held.items() if name in written}

    def num_bytes(self) -> int:
        """Of host memory."""
        return sum(held.numel() * held.element_size() for held in self._held.values())
