"""Example batches: random and valid for the model, at any batch size, the same for the same seed on every machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import ShardwrightError
from .workload import Workload

IGNORED_LABEL = -100  # what torch's cross-entropy, and transformers' losses, leave out
Draw = Literal["tokens", "same", "masked", "padding", "normal", "classes"]


@dataclass(frozen=True)
class BatchField:
    """One entry of a batch. shape is that of one sample, without the batch dimension.

    draw: tokens   integers in [0, high), the pad token where the batch's padding mask is 0
          same     a tensor of its own with the values of the field named in `of`
          masked   labels of masked language modelling: `of` at about 15 % of the places that are not padding, else -100
          padding  1 for real tokens, 0 for padding at the end; the first row is full
          normal   standard normal numbers
          classes  integers in [0, high)
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    draw: Draw
    high: int = 0
    of: str = ""
    pad: int = 0


def target_length(seq_len: int) -> int:
    """Tokens of a sequence-to-sequence target: T5's span corruption gives 114 for 512 (Raffel et al. 2020, 3.1.4)."""
    return max(4, seq_len // 4)


def fields_for(kind: str, config: Any, seq_len: int | None, dtype: torch.dtype) -> tuple[BatchField, ...]:
    """The batch of a transformers model of this kind. seq_len in tokens; dtype is that of real-valued entries."""
    if kind == "image-classification":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = getattr(config, "num_channels", 3)
        return (
            BatchField("pixel_values", (channels, height, width), dtype, "normal"),
            BatchField("labels", (), torch.int64, "classes", high=config.num_labels),
        )
    assert seq_len is not None
    text_config = config.get_text_config()
    vocab = text_config.vocab_size
    pad = getattr(text_config, "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < vocab else 0
    tokens = BatchField("input_ids", (seq_len,), torch.int64, "tokens", high=vocab, pad=pad)
    mask = BatchField("attention_mask", (seq_len,), torch.int64, "padding")
    if kind == "causal-lm":
        return (tokens, BatchField("labels", (seq_len,), torch.int64, "same", of="input_ids"))
    if kind == "masked-lm":
        return (tokens, mask, BatchField("labels", (seq_len,), torch.int64, "masked", of="input_ids"))
    labels = BatchField("labels", (target_length(seq_len),), torch.int64, "classes", high=vocab)
    return (tokens, mask, labels)


def draw_batch(
    fields: Sequence[BatchField], batch_size: int, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch of these fields. On the meta device only shapes. Drawn on the CPU, so equal on every device."""
    if torch.device(device).type == "meta":
        return {f.name: torch.empty(batch_size, *f.shape, dtype=f.dtype, device="meta") for f in fields}
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
    shape = (batch_size, *field.shape)
    if field.draw == "normal":
        # drawn in float64, so that every precision sees the same numbers, rounded
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(field.dtype)
    if field.draw == "padding":
        length = field.shape[-1]
        lengths = torch.randint(max(1, 3 * length // 4), length + 1, (batch_size,), generator=generator)
        lengths[0] = length
        return (torch.arange(length)[None, :] < lengths[:, None]).to(field.dtype)
    if field.draw == "same":
        return drawn[field.of].clone()
    if field.draw == "masked":
        chosen = torch.rand(shape, generator=generator) < 0.15
        chosen[:, 0] = True  # every sample has a label, so that no loss is a mean of nothing
        if mask is not None:
            chosen &= mask.bool()
        return torch.where(chosen, drawn[field.of], IGNORED_LABEL)
    values = torch.randint(0, field.high, shape, generator=generator, dtype=field.dtype)
    if field.draw == "tokens" and mask is not None:
        values = torch.where(mask.bool(), values, field.pad)
    return values


def example_batch_size(workload: Workload) -> int:
    """Samples in the workload's example batch."""
    if workload.batch_size:
        return workload.batch_size
    first = next(iter(workload.example_batch.values()))
    return first.shape[0] if first.dim() else 1


def make_batch(
    workload: Workload, batch_size: int | None = None, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random data that the workload's model accepts: batch_size samples, by default as many as in its example batch.

    For a model that Shardwright built, drawn anew. For a user's own, whose valid values only the user knows, samples
    are taken from the example batch, in random order with repetition; where that has no values (meta), real numbers are
    drawn and integers are 0, valid as an index of any table.
    """
    from .models import batch_fields  # models builds on this module

    count = batch_size or example_batch_size(workload)
    fields = batch_fields(workload)
    if fields is not None:
        return draw_batch(fields, count, device, seed)
    current = example_batch_size(workload)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, current, (count,), generator=generator)
    batch = {}
    for name, tensor in workload.example_batch.items():
        has_batch = tensor.dim() > 0 and tensor.shape[0] == current
        shape = (count, *tensor.shape[1:]) if has_batch else tuple(tensor.shape)
        if torch.device(device).type == "meta":
            batch[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        elif tensor.is_meta:
            real = tensor.dtype.is_floating_point
            values = torch.randn(shape, generator=generator, dtype=torch.float64) if real else torch.zeros(shape)
            batch[name] = values.to(device=device, dtype=tensor.dtype)
        else:
            batch[name] = (tensor[rows.to(tensor.device)] if has_batch else tensor.clone()).to(device)
    return batch


def resize_batch(workload: Workload, batch_size: int) -> Workload:
    """The same workload with an example batch of batch_size samples, on the device of the present one."""
    if batch_size < 1:
        raise ShardwrightError(
            f"a batch of {batch_size} samples", change="the batch size", works="1", means="a batch holds at least one"
        )
    device = next(iter(workload.example_batch.values())).device
    batch = make_batch(workload, batch_size, device=device, seed=workload.seed)
    spec = {**workload.spec, "batch_size": batch_size} if workload.spec else workload.spec
    return dataclasses.replace(workload, example_batch=batch, batch_size=batch_size, spec=spec)
