"""The single-device model as written, run eagerly: what `check` compares a program with.

Nothing of the planner, the passes or the runtime is used. The model runs op by op over the microbatches, gradients
accumulated, inside the context that capture uses (one attention operator, no rounding below float64). Random ops draw
from the counter-based generator, numbered in the order in which the model runs them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .counter_random import CounterBasedRandom
from .profiler.attention_interface import shardwright_attention
from .profiler.capture import compute_loss
from .profiler.inputs import batch_dims_of
from .profiler.workload import Workload
from .reference_checkpoint import modes_kept_in_recomputation


def split_batch(
    batch: Mapping[str, torch.Tensor], dims: Mapping[str, int], microbatch_size: int
) -> list[dict[str, torch.Tensor]]:
    """Contiguous microbatches; entries without a dimension that counts samples go to each whole. The last may be
    shorter."""
    cut = {name: torch.split(batch[name], microbatch_size, dim) for name, dim in dims.items()}
    count = max(map(len, cut.values()), default=1)
    return [{name: cut[name][k] if name in cut else t for name, t in batch.items()} for k in range(count)]


def forward_backward(
    workload: Workload, batch: Mapping[str, torch.Tensor], *, microbatch_size: int, step: int = 0
) -> torch.Tensor:
    """Loss of a step; gradients are left in .grad of the model's parameters. workload: with real values."""
    size = workload.global_batch
    total = torch.zeros((), dtype=torch.float64)
    workload.model.zero_grad()
    for index, microbatch in enumerate(split_batch(batch, batch_dims_of(workload), microbatch_size)):
        weight = min(microbatch_size, size - index * microbatch_size) / size
        random = CounterBasedRandom(workload.seed, step, index)
        with shardwright_attention(workload.model), random, modes_kept_in_recomputation():
            loss = compute_loss(workload.model, workload.loss, microbatch, workload.call)
            (loss * weight).backward()
        total += loss.detach().double().cpu() * weight
    return total
