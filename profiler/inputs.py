"""Example batches: random and valid for the model, at any batch size, the same for the same seed on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .workload import Workload

IGNORED_LABEL = -100  # what torch's cross-entropy, and transformers' losses, leave out
Draw = Literal["tokens", "same", "masked", "padding", "normal", "classes", "uniform", "chosen", "constant"]


@dataclass(frozen=True)
class BatchField:
    """One entry of a batch. shape is that of one sample, without the batch dimension.

    draw: tokens    integers in [0, high), the pad token where the batch's padding mask is 0
          same      a tensor of its own with the values of the field named in `of`, -100 for the tokens in `avoid`
          masked    labels of masked language modelling: `of` at about 15 % of the places that are no padding, else -100
          padding   1 for real tokens, 0 for padding at the end; the first row is full
          normal    standard normal numbers
          classes   integers in [0, high)
          uniform   numbers in [low, high)
          chosen    1 at about half of the places, else 0; each sample has at least one of each
          constant  the numbers in `values`, the same for every sample
    avoid: integers that tokens and classes never are. head: the first tokens of every sample (an image's placeholders).
    shared: one tensor for all samples, without a batch dimension (positions, for one).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    draw: Draw
    high: float = 0
    of: str = ""
    pad: int = 0
    low: float = 0
    avoid: tuple[int, ...] = ()
    head: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    shared: bool = False

    def tensor_shape(self, batch_size: int) -> tuple[int, ...]:
        return self.shape if self.shared else (batch_size, *self.shape)


def target_length(seq_len: int) -> int:
    """Tokens of a sequence-to-sequence target: T5's span corruption gives 114 for 512 (Raffel et al. 2020, 3.1.4)."""
    return max(4, seq_len // 4)


def draw_batch(
    fields: Sequence[BatchField], batch_size: int, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch of these fields. On the meta device only shapes. Drawn on the CPU, so equal on every device."""
    if torch.device(device).type == "meta":
        return {f.name: torch.empty(f.tensor_shape(batch_size), dtype=f.dtype, device="meta") for f in fields}
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, torch.Tensor] = {}
    mask = None
    for field in sorted(fields, key=lambda f: f.draw != "padding"):
        drawn[field.name] = _draw(field, batch_size, drawn, mask, generator)
        if field.draw == "padding":
            mask = drawn[field.name]
    return {field.name: drawn[field.name].to(device) for field in fields}


def _draw(
    field: BatchField,
    batch_size: int,
    drawn: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    generator: torch.Generator,
) -> torch.Tensor:
    shape = field.tensor_shape(batch_size)
    if field.draw == "constant":
        return torch.tensor(field.values, dtype=field.dtype).reshape(field.shape).expand(shape).clone()
    if field.draw == "uniform":
        draws = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (field.low + (field.high - field.low) * draws).to(field.dtype)
    if field.draw == "chosen":
        chosen = torch.rand(shape, generator=generator) < 0.5
        chosen[..., 0], chosen[..., -1] = True, False
        return chosen.to(field.dtype)
    if field.draw == "normal":
        # drawn in float64, so that every precision sees the same numbers, rounded
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(field.dtype)
    if field.draw == "padding":
        length = field.shape[-1]
        lengths = torch.randint(max(1, 3 * length // 4), length + 1, (batch_size,), generator=generator)
        lengths[0] = length
        return (torch.arange(length)[None, :] < lengths[:, None]).to(field.dtype)
    if field.draw == "same":
        source = drawn[field.of]
        ignored = torch.isin(source, torch.tensor(field.avoid, dtype=source.dtype))
        return torch.where(ignored, IGNORED_LABEL, source)
    if field.draw == "masked":
        chosen = torch.rand(shape, generator=generator) < 0.15
        chosen[:, 0] = True  # every sample has a label, so that no loss is a mean of nothing
        if mask is not None:
            chosen &= mask.bool()
        return torch.where(chosen, drawn[field.of], IGNORED_LABEL)
    avoided = sorted({number for number in field.avoid if field.low <= number < field.high})
    values = torch.randint(
        int(field.low), int(field.high) - len(avoided), shape, generator=generator, dtype=field.dtype
    )
    for number in avoided:  # in ascending order, each shifts what is left above it
        values += values >= number
    if field.draw == "tokens" and mask is not None and mask.shape == values.shape:
        values = torch.where(mask.bool(), values, field.pad)
    if field.head:
        values[..., : len(field.head)] = torch.tensor(field.head, dtype=field.dtype)
    return values


def example_batch_size(workload: Workload) -> int:
    """Samples in the workload's example batch: as declared, else the length in front of most of its tensors."""
    if workload.batch_size:
        return workload.batch_size
    return common_size(workload.example_batch, workload.batch_dims or {})


def common_size(batch: Mapping[str, torch.Tensor], declared: Mapping[str, int | None]) -> int:
    """The length that most tensors have in front, or where it is declared (the first of equals); 1 where none has a
    dimension."""
    dims = {name: declared.get(name, 0) for name in batch}
    sizes = Counter(t.shape[dim] for n, t in batch.items() if (dim := dims[n]) is not None and dim < t.dim())
    return max(sizes, key=sizes.__getitem__, default=1)


def reshaped(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Its values in another shape: along each dimension cut short, or begun again. Zeros where it has none (meta)."""
    if tensor.is_meta or not all(tensor.shape):
        return torch.zeros(tuple(shape), dtype=tensor.dtype, device=tensor.device)
    for dim, size in enumerate(shape):
        if size != tensor.shape[dim]:
            rows = torch.arange(size, device=tensor.device) % tensor.shape[dim]
            tensor = tensor.index_select(dim, rows)
    return tensor
