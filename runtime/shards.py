"""Shard arithmetic: which part of a tensor a rank holds, and how shards lie in the buffers of coalesced collectives.

Pieces are cut as torch.chunk and DTensor cut them: ceil(size / parts) each, the last ones shorter or empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

ALIGN_ELEMENTS = 8  # offsets in flat buffers are multiples of it: 16 bytes in bf16, enough for vector loads

Cut = tuple[int, int]  # number of pieces, which of them
DimCut = tuple[int, Cut]  # along which dimension


def chunk_bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """First and last-plus-one element of piece `index`."""
    step = -(-size // parts) if size else 0
    return min(size, index * step), min(size, (index + 1) * step)


def narrow_shape(shape: Sequence[int], cuts: Iterable[DimCut]) -> tuple[int, ...]:
    """Sizes of a rank's piece: each cut is made of what those before it left."""
    sizes = list(shape)
    for dim, (parts, index) in cuts:
        start, stop = chunk_bounds(sizes[dim], parts, index)
        sizes[dim] = stop - start
    return tuple(sizes)


def cut_bounds(size: int, cuts: Iterable[Cut]) -> tuple[int, int]:
    """Of a piece of a piece: each cut is made as chunk_bounds makes it."""
    start = 0
    for parts, index in cuts:
        low, high = chunk_bounds(size, parts, index)
        start, size = start + low, high - low
    return start, start + size


def shard_index(shape: Sequence[int], cuts: Iterable[DimCut]) -> tuple[slice, ...]:
    """Index of a rank's shard in the global tensor: each cut is made of what those before it left. A scalar is not
    cut."""
    by_dim: dict[int, list[Cut]] = {}
    for dim, cut in cuts:
        by_dim.setdefault(dim, []).append(cut)
    return tuple(slice(*cut_bounds(size, by_dim.get(dim, ()))) for dim, size in enumerate(shape))


@dataclass(frozen=True)
class Slot:
    """One tensor in a flat layout. rows: of dimension 0 on each rank, the last ranks' padded up to it."""

    shape: tuple[int, ...]
    rows: int
    row_shape: tuple[int, ...]
    offset: int
    elements: int  # of one rank's padded piece


class ShardLayout:
    """Several tensors, each cut on dimension 0 over n ranks, as one buffer of n equal blocks.

    buffer (n, B):   block r = rank r's padded pieces of all tensors, one after the other
    all-gather       this rank's block (B) -> buffer (n, B)
    reduce-scatter   buffer (n, B) -> this rank's block (B)

    A scalar has no dimension 0: it stands whole in every block.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], num_ranks: int, rank: int) -> None:
        self.num_ranks, self.rank = num_ranks, rank
        self.slots: dict[str, Slot] = {}
        offset = 0
        for name, shape in shapes.items():
            rows = -(-shape[0] // num_ranks) if shape else 1
            row_shape = tuple(shape[1:])
            elements = rows * _numel(row_shape)
            self.slots[name] = Slot(shape, rows, row_shape, offset, elements)
            offset += -(-elements // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
        self.block_elements = offset

    @property
    def has_padding(self) -> bool:
        return sum(_numel(slot.shape) for slot in self.slots.values()) != self.block_elements * self.num_ranks

    def shard(self, block: torch.Tensor, name: str) -> torch.Tensor:
        """This rank's own piece as a view of its block, without padding."""
        slot = self.slots[name]
        if not slot.shape:
            return block[slot.offset : slot.offset + 1].view(())
        start, stop = chunk_bounds(slot.shape[0], self.num_ranks, self.rank)
        count = (stop - start) * _numel(slot.row_shape)
        return block[slot.offset : slot.offset + count].view(stop - start, *slot.row_shape)

    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of this rank's pieces."""
        shapes = {}
        for name, slot in self.slots.items():
            start, stop = chunk_bounds(slot.shape[0], self.num_ranks, self.rank) if slot.shape else (0, 0)
            shapes[name] = (stop - start, *slot.row_shape) if slot.shape else ()
        return shapes

    def pack(self, buffer: torch.Tensor, name: str, value: torch.Tensor, *, add: bool) -> None:
        """Write (or add) a whole tensor into the blocks of all ranks."""
        slot = self.slots[name]
        pieces = buffer.view(self.num_ranks, -1)[:, slot.offset : slot.offset + slot.elements]
        if not slot.shape:
            target = pieces
            target.add_(value) if add else target.copy_(value)
            return
        if not slot.elements:
            return
        pieces = pieces.view(self.num_ranks, slot.rows, *slot.row_shape)
        full = slot.shape[0] // slot.rows  # ranks whose piece is whole
        left = slot.shape[0] - full * slot.rows
        parts = [(pieces[:full], value[: full * slot.rows].reshape(full, slot.rows, *slot.row_shape))]
        if left:
            parts.append((pieces[full, :left], value[full * slot.rows :]))
        for target, source in parts:
            target.add_(source) if add else target.copy_(source)

    def zero(self, buffer: torch.Tensor, name: str) -> None:
        slot = self.slots[name]
        buffer.view(self.num_ranks, -1)[:, slot.offset : slot.offset + slot.elements].zero_()

    def unpack(self, buffer: torch.Tensor, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor from the blocks of all ranks, contiguous; into `out` where given."""
        slot = self.slots[name]
        pieces = buffer.view(self.num_ranks, -1)[:, slot.offset : slot.offset + slot.elements]
        if out is None:
            out = torch.empty(slot.shape, dtype=buffer.dtype, device=buffer.device)
        if not slot.shape:
            return out.copy_(pieces[0, 0])
        if not slot.elements:
            return out
        pieces = pieces.view(self.num_ranks, slot.rows, *slot.row_shape)
        full = slot.shape[0] // slot.rows
        left = slot.shape[0] - full * slot.rows
        out[: full * slot.rows].view(full, slot.rows, *slot.row_shape).copy_(pieces[:full])
        if left:
            out[full * slot.rows :].copy_(pieces[full, :left])
        return out


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
