"""What an optimizer keeps, as tensors by name, so that checkpoints hold all of it.

    optimizer.NAME.KEY             a tensor kept for a parameter, laid out as that where it has its shape
    optimizer_number.NAME.KEY      a Python number kept for a parameter, such as a count of steps
    optimizer_own.KEY              kept for no parameter, as torch.optim.Optimizer.state allows
    optimizer_own_number.KEY

Anything else is refused by name: a resumed run would go on without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..errors import ExitCode, ShardwrightError
from .stepping import refusals_of
from .trained import Trained

_KINDS = ("optimizer", "optimizer_number", "optimizer_own", "optimizer_own_number")
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def is_state(key: str) -> bool:
    return key.split(".", 1)[0] in _KINDS


def parameter_of(key: str) -> str | None:
    """Of an entry kept for a parameter."""
    kind, rest = key.split(".", 1)
    return rest.rsplit(".", 1)[0] if kind in _KINDS[:2] else None


def entries(program: Trained) -> dict[str, torch.Tensor]:
    """Without copies, but for numbers. Raises ShardwrightError for what is neither tensor nor number."""
    optimizer = program.optimizer
    if optimizer is None:
        return {}
    found: dict[str, torch.Tensor] = {}
    for owner, kept in optimizer.state.items():
        if isinstance(owner, torch.Tensor):
            name = program.store.name_of(owner)
            for key, value in kept.items():
                _add(found, "optimizer", f"{name}.{key}", _as_parameter(program, name, value))
        else:
            _add(found, "optimizer_own", str(owner), kept)
    return found


def _add(found: dict[str, torch.Tensor], kind: str, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found[f"{kind}.{name}"] = value
    elif type(value) in _NUMBERS:
        found[f"{kind}_number.{name}"] = torch.tensor(value, dtype=_NUMBERS[type(value)])
    elif value is not None:  # which stands for what the optimizer has not made yet
        raise _not_saved(f"{name}, a {type(value).__name__},")


def _not_saved(what: str) -> ShardwrightError:
    return ShardwrightError(
        f"the optimizer keeps {what} which is neither a tensor nor a number",
        means="a checkpoint does not hold it, and a resumed run would go on without it",
        change="the optimizer's state",
        works="tensors and numbers in optimizer.state[parameter], or an optimizer of torch.optim",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


def refuse_more_than_state(optimizer: torch.optim.Optimizer | None) -> None:
    """Before a save: an optimizer whose state_dict() has more than torch's. Raises ShardwrightError."""
    if optimizer is None or type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return
    more = sorted(str(key) for key in set(optimizer.state_dict()) - {"state", "param_groups"})
    if more:
        raise _not_saved(f"{more[0]} in its state_dict() beside 'state' and 'param_groups',")


def _as_parameter(program: Trained, name: str, value: Any) -> Any:
    """State that lies as its parameter does; a count of steps is the same everywhere."""
    shape = program.store.local_parameters[name].shape
    same = isinstance(value, torch.Tensor) and value.shape == shape and not isinstance(value, DTensor)
    return program.store.as_dtensor(name, value) if same else value


@torch.no_grad()
def make_what_is_missing(program: Trained, saved: Shapes) -> None:
    """Entries of a checkpoint that this optimizer makes later, or only under the options that the checkpoint has.

    Raises ShardwrightError for one whose shape does not say how it lies.
    """
    optimizer = program.optimizer
    if optimizer is None or not optimizer.state:
        return
    here = entries(program)
    held = {program.store.name_of(p): p for group in optimizer.param_groups for p in group["params"]}
    for entry, (shape, dtype) in saved.items():
        if entry in here or not is_state(entry):
            continue
        name = parameter_of(entry)
        if name is None:
            of_none: dict[Any, Any] = optimizer.state  # of no parameter, under its own name
            of_none[entry.split(".", 1)[1]] = _empty(entry, None, shape, dtype)
        elif name in held and held[name] in optimizer.state:
            whole = tuple(program.store.specs[name].shape)
            like = held[name] if shape == whole else None
            optimizer.state[held[name]][entry.rsplit(".", 1)[1]] = _empty(entry, like, shape, dtype)


def _empty(entry: str, like: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    if entry.split(".", 1)[0].endswith("_number"):
        return next(kind for kind, held in _NUMBERS.items() if held == dtype)(0)
    if like is not None:
        return torch.zeros_like(like.detach(), dtype=dtype)
    if not shape:
        return torch.zeros((), dtype=dtype)
    raise ShardwrightError(
        f"the checkpoint has {entry} with shape {shape}; this optimizer keeps no such state",
        means="it is neither as large as its parameter nor a single number, so how it would lie here is not known",
        change="the optimizer, or the checkpoint's path",
        works="the optimizer that the checkpoint was written with",
        exit_code=ExitCode.PLAN_MISMATCH,
    )


def put_numbers(program: Trained, state: Mapping[str, torch.Tensor]) -> None:
    """Numbers were read into tensors of no dimension: bring them to where the optimizer looks for them."""
    optimizer = program.optimizer
    if optimizer is None:
        return
    for owner, kept in list(optimizer.state.items()):
        if isinstance(owner, torch.Tensor):
            name = program.store.name_of(owner)
            for key, value in kept.items():
                if (entry := f"optimizer_number.{name}.{key}") in state and type(value) in _NUMBERS:
                    kept[key] = type(value)(state[entry].item())
        elif (entry := f"optimizer_own_number.{owner}") in state and type(kept) in _NUMBERS:
            optimizer.state[owner] = type(kept)(state[entry].item())


@contextmanager
def new_state(program: Trained, wanted: bool) -> Iterator[None]:
    """Where the optimizer has no state yet, inside it has what it makes on its first step. It is dropped if the block
    fails."""
    optimizer = program.optimizer if wanted else None
    is_new = optimizer is not None and not optimizer.state
    if is_new:
        make(program)
    try:
        yield
    except BaseException:
        if is_new and optimizer is not None:
            optimizer.state.clear()
        raise


@torch.no_grad()
def make(program: Trained) -> None:
    """Give the optimizer the state that it makes on its first step, without moving a parameter or its own counts."""
    optimizer = program.optimizer
    if optimizer is None or optimizer.state:
        return
    held = (program.store.parameters, program.store.local_parameters)
    grads = [{name: p.grad for name, p in row.items()} for row in held]
    for row in held:
        for name, parameter in row.items():
            parameter.grad = torch.zeros_like(parameter) if program.store.specs[name].has_grad else None
    with program.not_a_step(), refusals_of(optimizer), _as_it_was(optimizer):
        optimizer.step()
    for row, before in zip(held, grads, strict=True):
        for name, parameter in row.items():
            parameter.grad = before[name]


@contextmanager
def _as_it_was(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A step inside leaves parameters and options as they are. torch's own move nothing at a rate of zero; of another
    nothing is known, and its parameters are copied."""
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    own = not type(optimizer).__module__.startswith("torch.optim")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = [p.detach().clone() for p in parameters] if own else []
    counts = {key: value for key, value in vars(optimizer).items() if type(value) in _NUMBERS} if own else {}
    for group in optimizer.param_groups if not own else ():
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    try:
        yield
    finally:
        for group, before in zip(optimizer.param_groups, options, strict=True):
            group.update(before)
        vars(optimizer).update(counts)
        for parameter, value in zip(parameters, values, strict=own):
            parameter.copy_(value)


def saved_shapes(items: Iterable[tuple[str, Any]]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in items}
