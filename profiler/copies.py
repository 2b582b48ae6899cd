"""Copies of a model that do what it does: copy.deepcopy and new parameters lose the hooks that a parameter carries, and
functions (hooks, a loss) that close over the model, or read it from their module, go on reading the original.

And what a run of the model itself leaves as it was.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ExitCode, ShardwrightError
from .where import is_users_file

if TYPE_CHECKING:
    from .workload import Workload


def copy_model(model: nn.Module) -> nn.Module:
    """Its hooks and its own functions read the copy where they close over the model."""
    refuse_scripted(model)
    with _values_left_behind():
        copied = copy.deepcopy(model)
    carry_hooks(model, copied)
    followed = _Follows(model, copied)
    for module in copied.modules():
        for name, held in list(vars(module).items()):
            if isinstance(held, (types.FunctionType, functools.partial)):
                vars(module)[name] = followed(held)
            elif name.endswith("_hooks") and isinstance(held, dict):
                for number, hook in list(held.items()):
                    held[number] = followed(hook)
    return copied


def refuse_scripted(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            kind = getattr(module, "original_name", type(module).__name__)
            raise ShardwrightError(
                f"{path or 'the model'} is a TorchScript module ({kind})",
                means="its forward is no Python that could be traced, and its parameters are not seen one by one",
                change=f"torch.jit.script or torch.jit.trace around {path or 'it'}",
                works="the module itself, as it was before it was scripted",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )


def copy_workload(workload: Workload) -> Workload:
    """With a copy of the model, and a loss that reads the copy where it closes over the model."""
    model = copy_model(workload.model)
    loss = None if workload.loss is None else _Follows(workload.model, model)(workload.loss)
    return dataclasses.replace(workload, model=model, loss=loss)


class _Follows:
    """Functions that read a model, or a part of it, from around them or from their module, as functions that read its
    copy."""

    def __init__(self, model: nn.Module, copied: nn.Module) -> None:
        self.others: dict[int, Any] = {}
        for kind in ("modules", "parameters", "buffers"):
            these, those = (list(getattr(one, kind)()) for one in (model, copied))
            if len(these) == len(those):
                self.others |= {id(one): other for one, other in zip(these, those, strict=True)}

    def __call__(self, thing: Any, depth: int = 3) -> Any:
        """The thing itself where nothing of the model is in it."""
        if id(thing) in self.others:
            return self.others[id(thing)]
        if depth == 0:
            return thing
        if isinstance(thing, types.MethodType):
            owner, function = self._object(thing.__self__, depth), self(thing.__func__, depth)
            same = owner is thing.__self__ and function is thing.__func__
            return thing if same else types.MethodType(function, owner)
        if isinstance(thing, functools.partial):
            held = self([thing.func, *thing.args], depth)
            keywords = {name: self(value, depth - 1) for name, value in thing.keywords.items()}
            return functools.partial(*held, **keywords)
        if type(thing) in (list, tuple):
            found = [self(item, depth - 1) for item in thing]
            return thing if all(a is b for a, b in zip(thing, found, strict=True)) else type(thing)(found)
        if type(thing) is dict:
            values = self(list(thing.values()), depth)
            same = all(a is b for a, b in zip(thing.values(), values, strict=True))
            return thing if same else dict(zip(thing, values, strict=True))
        return self._function(thing, depth) if isinstance(thing, types.FunctionType) else thing

    def _object(self, thing: Any, depth: int) -> Any:
        """What a bound method is of: a trainer that holds the model, say."""
        if id(thing) in self.others or isinstance(thing, nn.Module) or not hasattr(thing, "__dict__"):
            return self(thing, 0)
        found = {name: self(value, depth - 1) for name, value in vars(thing).items()}
        if all(found[name] is value for name, value in vars(thing).items()):
            return thing
        made = copy.copy(thing)
        vars(made).update(found)
        return made

    def _function(self, function: types.FunctionType, depth: int) -> types.FunctionType:
        cells = []
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                cells.append(cell)
                continue
            found = self(held, depth - 1)
            cells.append(cell if found is held else types.CellType(found))
        defaults = self(function.__defaults__ or (), depth)
        keywords = {name: self(value, depth - 1) for name, value in (function.__kwdefaults__ or {}).items()}
        before = [
            *(function.__closure__ or ()),
            *(function.__defaults__ or ()),
            *(function.__kwdefaults__ or {}).values(),
        ]
        module_level = self._globals(function, depth)
        same = all(a is b for a, b in zip(before, [*cells, *defaults, *keywords.values()], strict=True))
        if same and module_level is function.__globals__:
            return function
        made = types.FunctionType(function.__code__, module_level, function.__name__, defaults or None, tuple(cells))
        made.__kwdefaults__ = keywords or None
        made.__dict__.update(function.__dict__)
        made.__qualname__ = function.__qualname__
        return made

    def _globals(self, function: types.FunctionType, depth: int) -> dict[str, Any]:
        """Of the function's module, with what it reads of the model replaced by the copy's."""
        held = function.__globals__
        if not is_users_file(function.__code__.co_filename):
            return held
        read = {name: held[name] for name in _names_read(function.__code__) if name in held}
        found = {name: self(value, depth - 1) for name, value in read.items()}
        found = {name: value for name, value in found.items() if value is not read[name]}
        return _Over(found, held) if found else held


class _Over(dict[str, Any]):
    """Names of a module of which some are bound otherwise; the rest is what the module has when it is read."""

    def __init__(self, own: dict[str, Any], module: dict[str, Any]) -> None:
        super().__init__(own)
        self._module = module

    def __missing__(self, name: str) -> Any:
        return self._module[name]


def _names_read(code: types.CodeType) -> set[str]:
    """Names that may be the module's, those of functions within included."""
    within = [_names_read(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*within)


@contextmanager
def _values_left_behind() -> Iterator[None]:
    """Values that a forward left on the model, which torch does not copy, are copied without their history."""
    original = torch.Tensor.__deepcopy__

    def without_history(tensor: torch.Tensor, memo: Any) -> Any:
        return original(tensor if tensor.is_leaf else tensor.detach(), memo)

    torch.Tensor.__deepcopy__ = without_history  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.__deepcopy__ = original  # type: ignore[method-assign]


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """To each parameter of target, where it has none, the hooks that the source's of the same name has."""
    followed = _Follows(source, target)
    for name, parameter in source.named_parameters():
        carry_hooks_of(parameter, target.get_parameter(name), followed)


def carry_hooks_of(source: torch.Tensor, target: torch.Tensor, followed: Callable[[Any], Any] | None = None) -> None:
    if source is target:
        return
    follow = followed or (lambda hook: hook)
    if target.requires_grad and not target._backward_hooks:
        for hook in (source._backward_hooks or {}).values():
            target.register_hook(follow(hook))
    if target.requires_grad and not getattr(target, "_post_accumulate_grad_hooks", None):
        for hook in (getattr(source, "_post_accumulate_grad_hooks", None) or {}).values():
            target.register_post_accumulate_grad_hook(follow(hook))


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Inside, what the forward writes to buffers, or binds in their place, is undone afterwards."""
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                module._buffers[name] = buffer.copy_(value)
