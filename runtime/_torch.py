"""Private names of torch that the runtime leans on, in one place. Written against torch 2.11 to 2.13."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _metadata_fn, _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.pipelining.schedules import (
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
)
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.distributed.tensor import DTensor
from torch.serialization import _get_layout
from torch.utils import _pytree

TorchAction = _Action
ComputationType = _ComputationType
ScheduleRuntime = _PipelineScheduleRuntime
StageBase = _PipelineStageBase
# what DCP's index of a checkpoint is made of
DCP_INDEX_NAME = _metadata_fn
StorageInfo = _StorageInfo
MemoryFormatName = _MEM_FORMAT_ENCODING
layout_of_name = _get_layout
tree_unflatten = _pytree.tree_unflatten


def local_part(tensor: DTensor) -> torch.Tensor:
    """What to_local() gives, without autograd's part in it."""
    return tensor._local_tensor


def layout_of(tensor: DTensor) -> Any:
    """Mesh, placements, global shape and type, as DTensor keeps them."""
    return tensor._spec


def with_layout(local: torch.Tensor, layout: Any) -> DTensor:
    """What from_local() gives for a local tensor laid out as another, at a tenth of the time."""
    return DTensor(local.detach(), layout, requires_grad=False)


def num_step_hooks(optimizer: torch.optim.Optimizer) -> int:
    """Functions that are called around each step()."""
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


# torch 2.13 renamed both and warns about the old names
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
