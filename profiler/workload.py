"""Workload: the training job, with no hardware in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .calling import PLAIN_CALL, Call, take_apart

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[Any, Any], torch.Tensor]

_FUSED = frozenset({torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD})  # one kernel for all
# Their update of an element depends on nothing but that element.
_ELEMENTWISE = frozenset({
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.Adamax, torch.optim.AdamW,
    torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
})  # fmt: skip
_WAYS = ("foreach", "fused", "capturable", "differentiable")  # options that say how the update is computed


@dataclass(frozen=True)
class OptimizerSpec:
    """name as in torch.optim; factory(params) -> Optimizer. state_tensors: of a parameter's size that it keeps.

    skip_nonfinite: a step whose gradient has a NaN or an infinity anywhere is left out. post_validation: ranks step
    before they know the others' part of the norm, and put the step right where that asks for it (runtime/stepping.py).
    """

    name: str = "AdamW"
    factory: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    options: Mapping[str, Any] = field(default_factory=dict)
    state_tensors: int = 2
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    post_validation: bool = False

    @property
    def needs_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def waits_for_norm(self) -> bool:
        return self.needs_norm and not self.post_validation

    @property
    def is_elementwise(self) -> bool:
        """May parameters be stepped piece by piece?"""
        return self.factory in _ELEMENTWISE

    @property
    def is_fused(self) -> bool:
        """Torch's fused update is taken where nothing else is asked: it writes in place, parameters and state alike. A
        rate that is a tensor is computed with in its own dtype by the others alone."""
        named = [way for way in _WAYS if way in self.options]
        return bool(self.options.get("fused")) if named else self.factory in _FUSED and not self._has_tensors

    @property
    def _has_tensors(self) -> bool:
        return any(isinstance(option, torch.Tensor) for option in self.options.values())

    @property
    def step_tensors(self) -> int:
        """Of a parameter's size, that the update holds beside its state: torch's foreach updates keep one, as the
        denominator of Adam."""
        return 0 if self.is_fused else 1

    @property
    def kept_tensors(self) -> int:
        """Of a parameter's size, held from a step that may be rolled back until it is known to be right."""
        return 1 + self.state_tensors if self.needs_norm and self.post_validation else 0


@dataclass(frozen=True)
class LossScaling:
    """torch.amp.GradScaler's rule and values: what the loss is multiplied by, how that grows after growth_interval
    finite steps and shrinks after one that is not, which is left out."""

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    growth_interval: int = 2000


@dataclass(frozen=True)
class Precision:
    """compute: dtype of parameters and activations inside the graph. master: dtype of the optimizer's copy and state.

    Where compute and master are the same, the shard that the optimizer steps over is the only copy.
    loss_scaling: where compute is float16; None turns it off.
    """

    compute: torch.dtype = torch.bfloat16
    master: torch.dtype = torch.float32
    grad_reduce: torch.dtype = torch.float32
    loss_scaling: LossScaling | None = LossScaling()

    @property
    def scales_loss(self) -> bool:
        return self.compute == torch.float16 and self.loss_scaling is not None


@dataclass(frozen=True)
class Workload:
    """model may live on meta. example_batch: whatever the model is called with (profiler/calling.py); kept as its
    tensors by name, with its form in `call`.

    loss(model_output, batch) -> scalar; None: the model's output is, or has, the loss (attribute or key 'loss', or a
    scalar first element). model_inputs: the entries that the model is given, where its forward does not say it.
    batch_dims: the dimension of an entry that counts samples, None for what all samples share; entries left out are
    looked into (profiler/batch_dims.py).
    """

    model: nn.Module
    example_batch: Batch
    global_batch: int
    loss: Loss | None = None
    optimizer: OptimizerSpec = OptimizerSpec()
    precision: Precision = Precision()
    batch_size: int = 0  # of example_batch; 0: the length in front of most of its tensors
    tokens_per_sample: int = 0  # sequence length; 0: dimension 1 of the first integer tensor, else 1
    name: str = "model"
    spec: Mapping[str, Any] = field(
        default_factory=dict
    )  # what rebuilds it: {"model": "preset:gpt2", "seq_len": 1024, ...}
    seed: int = 0
    model_inputs: tuple[Any, ...] | None = None
    batch_dims: Mapping[str, int | None] | None = None
    call: Call = PLAIN_CALL

    def __post_init__(self) -> None:
        if self.precision.scales_loss and not self.optimizer.skip_nonfinite:  # scaling is by trial and error
            object.__setattr__(self, "optimizer", replace(self.optimizer, skip_nonfinite=True))
        tensors, form = take_apart(self.example_batch)
        if form is not None or self.model_inputs != self.call.inputs:
            object.__setattr__(self, "example_batch", tensors)
            object.__setattr__(self, "call", Call(form or self.call.form, self.model_inputs))
