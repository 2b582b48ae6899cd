"""Batches of a workload: what they hold, at any size, and which dimension of an entry counts samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..errors import ShardwrightError
from . import diffusion
from .hf_batches import fields_for
from .inputs import BatchField, draw_batch, example_batch_size
from .model_kinds import KINDS
from .small_models import SMALL_MODELS
from .workload import Workload


def batch_fields(workload: Workload) -> tuple[BatchField, ...] | None:
    """What a batch of this workload holds; None for a user's own model."""
    spec, dtype = workload.spec, workload.precision.compute
    kind = spec.get("kind")
    if kind in KINDS:
        return fields_for(kind, workload.model, spec.get("seq_len"), dtype)
    if kind == diffusion.KIND:
        config: Any = workload.model.config
        return diffusion.fields_for(spec["class_name"], config, spec.get("seq_len"), dtype, spec.get("overrides", {}))
    if kind == "small":
        small = SMALL_MODELS[spec["builder"]]
        return small.fields({**small.options, **spec.get("overrides", {})}, dtype)
    return None


def batch_dims_of(workload: Workload) -> dict[str, int]:
    """Entry -> its dimension that counts samples, of those that have one; where nothing is declared, the first of each
    tensor that is as long as the batch."""
    size, declared = example_batch_size(workload), dict(workload.batch_dims or {})
    declared |= {field.name: None if field.shared else 0 for field in batch_fields(workload) or ()}
    dims = {
        n: declared.get(n, 0 if t.dim() and t.shape[0] == size else None) for n, t in workload.example_batch.items()
    }
    return {name: dim for name, dim in dims.items() if dim is not None}


def make_batch(
    workload: Workload,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    in_order: bool = False,
) -> dict[str, torch.Tensor]:
    """Random data that the workload's model accepts: batch_size samples, by default as many as in its example batch.

    For a model that Shardwright built, drawn anew. For a user's own, whose valid values only the user knows, samples
    are taken from the example batch, in random order with repetition, or in_order, so that all are there where there is
    room; where that has no values (meta), real numbers are drawn and integers are 0, valid as an index of any table.
    """
    count = batch_size or example_batch_size(workload)
    fields = batch_fields(workload)
    if fields is not None:
        return draw_batch(fields, count, device, seed)
    current, dims = example_batch_size(workload), batch_dims_of(workload)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(count) % current if in_order else torch.randint(0, current, (count,), generator=generator)
    batch = {}
    for name, tensor in workload.example_batch.items():
        dim = dims.get(name)
        shape = tuple(count if d == dim else s for d, s in enumerate(tensor.shape))
        if torch.device(device).type == "meta":
            batch[name] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        elif tensor.is_meta:
            real = tensor.dtype.is_floating_point
            values = torch.randn(shape, generator=generator, dtype=torch.float64) if real else torch.zeros(shape)
            batch[name] = values.to(device=device, dtype=tensor.dtype)
        else:
            chosen = tensor.clone() if dim is None else tensor.index_select(dim, rows.to(tensor.device))
            batch[name] = chosen.to(device)
    return batch


def resize_batch(workload: Workload, batch_size: int) -> Workload:
    """The same workload with an example batch of batch_size samples, on the device of the present one."""
    if batch_size < 1:
        raise ShardwrightError(
            f"a batch of {batch_size} samples", change="the batch size", works="1", means="a batch holds at least one"
        )
    device = next(iter(workload.example_batch.values())).device
    batch = make_batch(workload, batch_size, device=device, seed=workload.seed, in_order=True)
    spec = {**workload.spec, "batch_size": batch_size} if workload.spec else workload.spec
    dims = workload.batch_dims if workload.batch_dims is not None else resized_dims(workload)
    return dataclasses.replace(workload, example_batch=batch, batch_size=batch_size, spec=spec, batch_dims=dims)


def resized_dims(workload: Workload) -> dict[str, int | None]:
    """batch_dims before the size changes: at another size, other dimensions may be as long."""
    dims = batch_dims_of(workload)
    return {name: dims.get(name) for name in workload.example_batch}
