"""Trained: what checkpoints and evaluation know of a program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from ..plans.document import Plan
from ..profiler.graph import ModelGraph
from ..profiler.workload import Workload
from ..schedules import PipelineSchedule
from .buffers import Buffers, Written
from .half_loaded import HalfLoaded
from .loss_scaling import LossScaler
from .mesh import RankGrid
from .offload import HostMemory
from .parameters import ParameterStore
from .trace import Recorder


class Trained(Protocol):
    plan: Plan
    graph: ModelGraph
    workload: Workload
    device: torch.device
    grid: RankGrid
    store: ParameterStore
    buffers: Buffers
    scaler: LossScaler | None
    host: HostMemory
    recorder: Recorder
    stage_rank: tuple[int, ...]
    written: dict[str, Written]
    step_index: int
    half_loaded: HalfLoaded

    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...

    @property
    def microbatch_size(self) -> int: ...

    def schedule(self, num_microbatches: int, training: bool = True) -> PipelineSchedule: ...

    def settle(self) -> None: ...

    def not_a_step(self) -> AbstractContextManager[None]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]: ...
