"""The optimizer step: clipping, the check for NaN, and steps that wait for neither.

Both need the norm of the whole model's gradient, and with it the last backward of every rank. Post-validation (Qi et
al., arXiv:2401.10241, section 4) lets each rank step with what it has; the norm arrives while the ranks go on, and is
looked at before the new parameters are used. A step that should have been clipped, or left out, is rolled back and done
again. What the step overwrites is copied before and copied back then, so the result is bit for bit that of waiting.

After a step that was clipped the next one probably will be too: ranks then wait. They all decide by the same norm, so
they all take the same way.

What is in host memory is stepped there in subgroups of units (ZeRO-Offload, Ren et al., arXiv:2101.06840; subgroups as
in Deep Optimizer States, Maurya et al., arXiv:2410.21316): the new parameters of one are on their way to the device
while the next is stepped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..errors import ExitCode, ShardwrightError, first_line
from ..profiler.workload import OptimizerSpec
from ._torch import num_step_hooks
from .collectives import Summing
from .loss_scaling import LossScaler
from .optimizer import clip_factor, scale_gradients, start_grad_norm, subgroups
from .parameters import ParameterStore, local_tensor

SUBGROUP_ELEMENTS = 1 << 26


class Stepper:
    """One rank's optimizer steps, of which the last may still be on trial."""

    def __init__(
        self,
        spec: OptimizerSpec,
        store: ParameterStore,
        scaler: LossScaler | None = None,
        *,
        before_asked: Callable[[], None] = lambda: None,
    ) -> None:
        """scaler: is told of each step's gradient; spec leaves out those that are not finite. before_asked: called
        before a step that the user asks the optimizer for."""
        self.spec, self.store, self.scaler, self._before_asked = spec, store, scaler, before_asked
        assert scaler is None or spec.skip_nonfinite
        self._norm: torch.Tensor | None = None
        self._trial: _Trial | None = None
        self._was_clipped = False
        self._in_parts = False  # of a step under way parameters are refreshed part by part
        self._is_ours = False  # of a step under way: the program makes it
        self.was_asked = False  # the user has called the optimizer's own step()

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """What it steps over is brought to where it is computed with, after each of its steps; a step that the user
        asks it for counts as one of the program's."""
        optimizer.register_step_pre_hook(lambda *_: self._before())
        optimizer.register_step_post_hook(lambda *_: self._after())

    def _before(self) -> None:
        if self._is_ours:
            return
        if self.spec.needs_norm:
            raise _leaves_out_norm(self.spec)
        self._before_asked()
        self.store.take_gradients()

    def _after(self) -> None:
        if not self._in_parts:
            self.store.refresh()
        self.was_asked |= not self._is_ours

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Steps inside are not the user's."""
        before, self._is_ours = self._is_ours, True
        try:
            yield
        finally:
            self._is_ours = before

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Of the last step; None where nothing asks for it."""
        return self._norm if self._trial is None else self._trial.square.wait().sqrt()

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None, refuse: Callable[[], None] = lambda: None) -> None:
        """refuse: raises on all ranks alike where the gradients are not to be stepped by; it waits for the others, so
        it is called where the step does."""
        self.settle()
        if not self.spec.needs_norm:
            refuse()
            self._apply(optimizer)
            return
        square = start_grad_norm(self.store)
        if self.spec.post_validation and not self._was_clipped and _leaves_gradients(optimizer):
            self._trial = _Trial(self.store, optimizer, square, refuse)
            self._apply(optimizer)
        else:
            refuse()
            self._norm = square.wait().sqrt()
            self._was_clipped = self.spec.post_validation and self._rejects(self._norm)
            self._redo(optimizer)
            self._update_scale()

    @torch.no_grad()
    def settle(self) -> None:
        """Keep the step that is on trial, or put it right. Every rank calls it before anything else uses the
        parameters. Raises ShardwrightError for a step that was none, with all as it was before it."""
        trial, self._trial = self._trial, None
        if trial is None:
            return
        try:
            trial.refuse()
        except ShardwrightError:
            trial.roll_back()
            self.store.refresh()
            raise
        self._norm = trial.square.wait().sqrt()
        self._was_clipped = self._rejects(self._norm)
        if self._was_clipped:
            trial.roll_back()
            self._redo(trial.optimizer)
            trial.put_options_back()
            self.store.clear_gradients()
        self._update_scale()

    def _update_scale(self) -> None:
        if self.scaler is not None:
            assert self._norm is not None
            self.scaler.update(bool(self._norm.isfinite()))

    def kept_bytes(self) -> int:
        return 0 if self._trial is None else self._trial.num_bytes()

    def _rejects(self, norm: torch.Tensor) -> bool:
        """Does a plain step differ from the one asked for?"""
        limit = self.spec.max_grad_norm
        if not norm.isfinite():
            return True
        return limit is not None and bool(clip_factor(limit, norm) < 1.0)

    def _redo(self, optimizer: torch.optim.Optimizer | None) -> None:
        """The step of a known norm."""
        assert self._norm is not None
        if self.spec.skip_nonfinite and not self._norm.isfinite():
            self.store.refresh()
            return
        if self.spec.max_grad_norm is not None:
            scale_gradients(self.store, clip_factor(self.spec.max_grad_norm, self._norm))
        self._apply(optimizer)

    def _apply(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            self.store.refresh()
        else:
            self.store.take_gradients()
            with self.ours(), refusals_of(optimizer):
                if self.store.link is not None and self._may_divide(optimizer):
                    self._step_in_parts(optimizer)
                else:
                    optimizer.step()

    def _may_divide(self, optimizer: torch.optim.Optimizer) -> bool:
        """Is a step of some parameters after the others the same as one of all? Hooks are called once a step."""
        own_hooks = 2
        return (
            type(optimizer) is self.spec.factory and self.spec.is_elementwise and num_step_hooks(optimizer) == own_hooks
        )

    def _step_in_parts(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer passes over parameters without a gradient."""
        grads = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
        self._in_parts = True
        try:
            with self.store.refreshing() as refresh:
                for units in subgroups(self.store.units, SUBGROUP_ELEMENTS):
                    part = {self.store.local_parameters[name] for unit in units for name in unit.names}
                    for parameter, grad in grads.items():
                        parameter.grad = grad if parameter in part else None
                    if any(grads.get(parameter) is not None for parameter in part):
                        optimizer.step()
                    for unit in units:
                        refresh(unit)
        finally:
            self._in_parts = False
            for parameter, grad in grads.items():
                parameter.grad = grad


@contextmanager
def refusals_of(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What an optimizer raises on its way, said in our way: over parts of parameters not each can step."""
    try:
        yield
    except ShardwrightError:
        raise
    except Exception as error:  # anybody's code, which may raise anything
        cut = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
        raise ShardwrightError(
            f"{type(optimizer).__name__}.step() failed: {type(error).__name__}: {first_line(error)}",
            means="it steps over DTensors here, of which this rank holds a part, and uses an op that those lack"
            if cut
            else "the step is the optimizer's own, over the parameters as plain tensors",
            change="the optimizer, or the layout" if cut else "the optimizer",
            works="an optimizer of torch.optim such as AdamW, or --force pp=N, by which ranks hold parameters whole"
            if cut
            else "an optimizer whose step() takes no arguments and that these parameters suit, such as AdamW",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        ) from error


def _leaves_out_norm(spec: OptimizerSpec) -> ShardwrightError:
    asks = "clipping" if spec.max_grad_norm is not None else "leaving out steps that are not finite"
    return ShardwrightError(
        f"optimizer.step() was called, and the program's steps ask for {asks}",
        means="the optimizer alone does not do that",
        change="optimizer.step()",
        works="program.optimizer_step()",
    )


def _leaves_gradients(optimizer: torch.optim.Optimizer | None) -> bool:
    """A second try needs them. SGD's foreach form adds the momentum to them under nesterov and maximize; of another
    optimizer than torch's nothing is known."""
    if optimizer is None:
        return True
    if not type(optimizer).__module__.startswith("torch.optim"):
        return False
    sgd = isinstance(optimizer, torch.optim.SGD)
    return not (sgd and any(group["nesterov"] or group["maximize"] for group in optimizer.param_groups))


class _Trial:
    """What a step overwrites, as it was, and what it steps by."""

    def __init__(
        self,
        store: ParameterStore,
        optimizer: torch.optim.Optimizer | None,
        square: Summing,
        refuse: Callable[[], None],
    ) -> None:
        self.store, self.optimizer, self.square, self.refuse = store, optimizer, square, refuse
        self._grads = {name: p.grad for name, p in store.parameters.items() if p.grad is not None}
        self._values: dict[torch.Tensor, torch.Tensor] = {}
        self._states: dict[torch.Tensor, dict[str, Any]] = {}
        self._groups: list[dict[str, Any]] = []
        self._later: list[dict[str, Any]] = []
        if optimizer is None:
            return
        store.take_gradients()
        for group in optimizer.param_groups:
            self._groups.append(_copied(_options(group)))
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._values[parameter] = parameter.detach().clone()
                    self._states[parameter] = _copied(optimizer.state.get(parameter, {}))

    def roll_back(self) -> None:
        """Parameters, state, gradients and options are those of before the step."""
        for name, grad in self._grads.items():
            self.store.parameters[name].grad = grad
        if self.optimizer is None:
            return
        for parameter, value in self._values.items():
            parameter.copy_(value)
            _restore(self.optimizer.state, parameter, self._states[parameter])
        for group, options in zip(self.optimizer.param_groups, self._groups, strict=True):
            self._later.append(_options(group))
            group.update(options)

    def put_options_back(self) -> None:
        """Those that a scheduler has set since the step."""
        if self.optimizer is not None:
            for group, options in zip(self.optimizer.param_groups, self._later, strict=True):
                group.update(options)

    def num_bytes(self) -> int:
        """Of the copies."""
        states = [value for state in self._states.values() for value in state.values()]
        tensors = [local_tensor(t) for t in (*self._values.values(), *states) if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) for k, v in values.items()}


def _restore(states: dict[torch.Tensor, dict[str, Any]], parameter: torch.Tensor, before: dict[str, Any]) -> None:
    """In place, where there is a place: an optimizer may hold on to its tensors."""
    if not before:
        states.pop(parameter, None)
        return
    for name, value in before.items():
        here = states[parameter].get(name)
        if isinstance(here, torch.Tensor) and isinstance(value, torch.Tensor) and here.shape == value.shape:
            here.copy_(value)
        else:
            states[parameter][name] = value
