"""The single-device model as written, run eagerly: what `check` compares a program with.

Nothing of the planner, the passes or the runtime is used. The model runs op by op on the whole batch, or where that is
not the same over the microbatches, gradients accumulated, inside the context that capture uses (one attention operator,
no rounding below float64). Random ops draw from the counter-based generator, numbered in the order in which the model
runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from .counter_random import CounterBasedRandom
from .profiler.attention_interface import shardwright_attention
from .profiler.batches import batch_dims_of
from .profiler.capture import compute_loss
from .profiler.copies import buffers_kept
from .profiler.workload import Workload
from .reference_checkpoint import modes_kept_in_recomputation
from .reference_counts import CountedTargets, has_batch_statistics


def split_batch(
    batch: Mapping[str, torch.Tensor], dims: Mapping[str, int], microbatch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Contiguous microbatches; entries without a dimension that counts samples go to each whole. The last may be
    shorter."""
    cut = {name: torch.split(batch[name], microbatch_size, dim) for name, dim in dims.items()}
    count = max(map(len, cut.values()), default=1)
    return [{name: cut[name][k] if name in cut else t for name, t in batch.items()} for k in range(count)]


def forward_backward(
    workload: Workload,
    batch: Mapping[str, torch.Tensor],
    *,
    microbatch_size: int,
    step: int = 0,
    loss_over: str = "mean",
) -> torch.Tensor:
    """Loss of a step; gradients are left in .grad of the model's parameters. workload: with real values.

    loss_over: as in the plan. Where a microbatch makes no difference to the model as written, it runs on the whole
    batch; where it draws random numbers, writes to buffers, or has a loss of each microbatch, it runs on each.
    """
    size = workload.global_batch
    parts = split_batch(batch, batch_dims_of(workload), microbatch_size)
    totals: list[torch.Tensor] | None = None
    if len(parts) > 1 and loss_over != "each":
        found, is_of_microbatch = _counted(workload, parts, step)
        if is_of_microbatch or has_batch_statistics(workload.model):
            totals = [torch.stack(row).sum() for row in zip(*found, strict=True)]
        else:
            parts = [dict(batch)]
    total = torch.zeros((), dtype=torch.float64)
    workload.model.zero_grad()
    for index, microbatch in enumerate(parts):
        share = min(microbatch_size, size - index * microbatch_size) / size if len(parts) > 1 else 1.0
        weight = 1.0 if loss_over == "sum" else share
        random = CounterBasedRandom(workload.seed, step, index)
        counts = CountedTargets(totals, share) if totals is not None else nullcontext()
        with shardwright_attention(workload.model), random, counts, modes_kept_in_recomputation():
            loss = compute_loss(workload.model, workload.loss, microbatch, workload.call)
            (loss * weight).backward()
        total += loss.detach().double().cpu() * weight
    return total


def _counted(
    workload: Workload, parts: list[dict[str, torch.Tensor]], step: int
) -> tuple[list[list[torch.Tensor]], bool]:
    """The weights of targets of each mean of each microbatch; whether the model draws random numbers or writes to
    buffers, which the next microbatch reads."""
    found, draws = [], False
    before = {name: buffer.clone() for name, buffer in workload.model.named_buffers()}
    with buffers_kept(workload.model):  # with gradients, as hooks on activations cannot be put where none flow
        for index, microbatch in enumerate(parts):
            random, counts = CounterBasedRandom(workload.seed, step, index), CountedTargets()
            with shardwright_attention(workload.model), random, counts:
                compute_loss(workload.model, workload.loss, microbatch, workload.call)
            found.append(counts.found)
            draws = draws or random.count > 0
        after = dict(workload.model.named_buffers())
        writes = after.keys() != before.keys() or any(not torch.equal(after[n], old) for n, old in before.items())
    return found, draws or writes
