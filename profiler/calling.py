"""How a batch is handed to a model: what a user writes as model(**batch), model(*batch) or model(batch).

A batch is a mapping, a tuple or list, a dataclass or a single tensor, nested as the model wants it, with None, numbers
and text among its tensors. The rest of the program knows tensors by name alone: take_apart() gives these and a form,
the form makes the batch of them again. What is no tensor is part of the captured graph, so it may not change.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ExitCode, ShardwrightError

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_P = inspect.Parameter


@dataclass(frozen=True)
class Form:
    """One place of a batch. key: what finds it in what holds it. name: of the tensor, where it is one.

    children: of what holds others, which make(values by key) builds again.
    """

    key: Any
    name: str
    children: tuple[Form, ...] | None = None
    make: Callable[[dict[Any, Any]], Any] = dict
    constant: Any = None
    is_tensor: bool = False

    def put_together(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """The batch as its user made it, of these tensors."""
        if self.is_tensor:
            return tensors[self.name]
        if self.children is None:
            return self.constant
        return self.make({child.key: child.put_together(tensors) for child in self.children})

    def tensors_of(self, batch: Any) -> dict[str, torch.Tensor]:
        """The tensors of another batch by name. Raises ShardwrightError where it has another form."""
        found: dict[str, torch.Tensor] = {}
        self._collect(batch, found)
        return found

    def _collect(self, value: Any, found: dict[str, torch.Tensor]) -> None:
        if self.is_tensor:
            if not isinstance(value, torch.Tensor):
                raise _other_form(self.name, "a tensor", _describe(value))
            found[self.name] = value
            return
        if self.children is None:
            if isinstance(value, torch.Tensor) or type(value) is not type(self.constant) or value != self.constant:
                raise _other_form(self.name, repr(self.constant), _describe(value))
            return
        parts = _parts(value)
        keys, expected = set(parts or ()), {child.key for child in self.children}
        if parts is None or keys != expected:
            others = ", ".join(map(str, sorted(keys ^ expected, key=str))) if parts is not None else ""
            raise _other_form(
                self.name or "the batch",
                f"entries {', '.join(str(child.key) for child in self.children)}",
                f"{_describe(value)}{'; not in both: ' + others if others else ''}",
            )
        for child in self.children:
            child._collect(parts[child.key], found)


def take_apart(batch: Any) -> tuple[dict[str, torch.Tensor], Form | None]:
    """(tensors by name, form). No form for what is a plain dictionary of tensors. Names of nested ones are joined by
    dots; those of a tuple are their positions."""
    if type(batch) is dict and all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in batch.items()):
        return batch, None
    tensors: dict[str, torch.Tensor] = {}
    form = _form("", batch, (), tensors)
    return tensors, form


def _form(key: Any, value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Form:
    name = ".".join(path)
    if isinstance(value, torch.Tensor):
        name = name or "input"
        while name in tensors:  # {"a.b": x, "a": {"b": y}}
            name += "_"
        tensors[name] = value
        return Form(key, name, is_tensor=True)
    if isinstance(value, _CONSTANTS):
        return Form(key, name, constant=value)
    parts = _parts(value)
    if parts is None:
        raise ShardwrightError(
            f"{_place(name)} is {_describe(value)}",
            means="a batch holds tensors, numbers, text and None, in mappings, tuples, lists and dataclasses",
            change=_place(name),
            works="torch.as_tensor(...) of it, or leave it out and let the model own it",
        )
    children = tuple(_form(k, part, (*path, str(k)), tensors) for k, part in parts.items())
    return Form(key, name, children, _maker(value))


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key; None for what is no container."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _maker(value: Any) -> Callable[[dict[Any, Any]], Any]:
    kind = type(value)
    if isinstance(value, Mapping):
        return kind if kind.__module__ == "collections" and kind.__name__ == "OrderedDict" else dict
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return functools.partial(_by_position, kind)
    if isinstance(value, (tuple, list)):
        return functools.partial(_in_order, tuple if isinstance(value, tuple) else list)
    return functools.partial(_by_name, kind)


def _by_position(kind: Callable[..., Any], parts: dict[Any, Any]) -> Any:
    return kind(*parts.values())


def _in_order(kind: Callable[..., Any], parts: dict[Any, Any]) -> Any:
    return kind(parts.values())


def _by_name(kind: Callable[..., Any], parts: dict[Any, Any]) -> Any:
    return kind(**parts)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, _CONSTANTS):
        return repr(value)
    return f"of type {type(value).__name__}"


def _place(name: str) -> str:
    return f"entry {name!r} of the batch" if name else "the batch"


def _other_form(name: str, planned: str, found: str) -> ShardwrightError:
    place = name if name == "the batch" else _place(name)
    return ShardwrightError(
        f"{place} was {planned} when it was planned, and is {found} now",
        means="what is no tensor is written into the captured graph, and so is which entries there are",
        change=place,
        works=f"{planned}; or a tensor from the beginning, whose values may change",
        exit_code=ExitCode.PLAN_MISMATCH,
    )


# --------------------------------------------------------------------------- the call


@dataclass(frozen=True)
class Call:
    """How a workload calls its model. inputs: names (of a tuple: positions) of the entries that the model is given,
    None: those that its forward takes; the loss function gets the whole batch."""

    form: Form | None = None
    inputs: tuple[Any, ...] | None = None

    def batch_of(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """As its user makes it, and as a program takes it."""
        return tensors if self.form is None else self.form.put_together(tensors)

    def output(self, model: nn.Module, tensors: Mapping[str, torch.Tensor], *, with_loss: bool) -> tuple[Any, Any]:
        """(what the model returns, the batch as its user made it)."""
        batch = self.batch_of(tensors)
        arguments, keywords = arguments_of(model, batch, with_loss=with_loss, inputs=self.inputs)
        return model(*arguments, **keywords), batch


PLAIN_CALL = Call()


def arguments_of(
    model: nn.Module, batch: Any, *, with_loss: bool, inputs: Sequence[Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of model(...). with_loss: a function takes the rest of the batch.

    A tuple or list is model(*batch), what is neither that nor a mapping model(batch). A mapping is model(**batch),
    where positional-only arguments and *args are filled in the mapping's order; model(batch) where forward takes one
    argument that is no entry's name. Raises ShardwrightError for an entry that nothing takes.
    """
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        return _positions(model, batch, with_loss, inputs), {}
    if not isinstance(batch, Mapping):
        return (batch,), {}
    parameters = _parameters(model)
    if inputs is not None:
        missing = [name for name in inputs if name not in batch]
        if missing:
            raise _undecided(f"inputs={tuple(inputs)!r} names {missing[0]!r}, which the batch lacks", batch)
        batch = {name: batch[name] for name in inputs}
        with_loss = False
    if _takes_one_mapping(parameters, batch):
        return (batch,), {}
    return _named(model, parameters, batch, with_loss)


def named_entries(model: nn.Module, batch: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries that the model's forward names."""
    names = {p.name for p in _parameters(model)}
    return tuple(name for name in batch if name in names)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a forward without a Python signature, as a scripted one
        return [_P("batch", _P.VAR_KEYWORD)]


def _takes_one_mapping(parameters: Collection[inspect.Parameter], batch: Mapping[str, Any]) -> bool:
    named = [p for p in parameters if p.kind not in (_P.VAR_POSITIONAL, _P.VAR_KEYWORD)]
    required = [p for p in named if p.default is _P.empty]
    return len(required) == 1 and required[0].kind is not _P.KEYWORD_ONLY and not any(p.name in batch for p in named)


def _named(
    model: nn.Module, parameters: Sequence[inspect.Parameter], batch: Mapping[str, Any], with_loss: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kinds = {p.kind for p in parameters}
    names = {p.name for p in parameters if p.kind not in (_P.VAR_POSITIONAL, _P.VAR_KEYWORD)}
    left = [name for name in batch if name not in names]
    by_position = _P.VAR_POSITIONAL in kinds and _P.VAR_KEYWORD not in kinds
    arguments: list[Any] = []
    for p in parameters:
        if p.kind is _P.POSITIONAL_ONLY or (by_position and p.kind is _P.POSITIONAL_OR_KEYWORD):
            if p.name not in batch:
                break
            arguments.append(batch[p.name])
    given = [p.name for p in parameters if p.kind is not _P.KEYWORD_ONLY][: len(arguments)]
    keywords = {name: batch[name] for name in batch if name in names and name not in given}
    if by_position and left and not keywords.keys() - {p.name for p in parameters if p.kind is _P.KEYWORD_ONLY}:
        arguments += [batch[name] for name in left]
    elif _P.VAR_KEYWORD in kinds:
        keywords |= {name: batch[name] for name in left}
    elif left and not with_loss:
        raise _undecided(
            f"{type(model).__name__}.forward takes no {', '.join(map(repr, left))}, which the batch has", batch
        )
    lacking = [
        p.name
        for p in parameters
        if p.default is _P.empty and p.name in names and p.name not in keywords and p.name not in given
    ]
    if lacking:
        raise _undecided(
            f"{type(model).__name__}.forward needs {', '.join(map(repr, lacking))}, which the batch lacks", batch
        )
    return tuple(arguments), keywords


def _positions(
    model: nn.Module, batch: Sequence[Any], with_loss: bool, inputs: Sequence[Any] | None
) -> tuple[Any, ...]:
    if inputs is not None:
        return tuple(batch[int(position)] for position in inputs)
    if not with_loss:
        return tuple(batch)
    places = [p for p in _parameters(model) if p.kind in (_P.POSITIONAL_ONLY, _P.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is _P.empty for p in places)
    if len(places) > required and len(batch) > required:
        raise _undecided(
            f"the batch is a {type(batch).__name__} of {len(batch)}, and {type(model).__name__}.forward takes "
            f"{required} to {len(places)} of them",
            batch,
        )
    return tuple(batch[:required])


def _undecided(what: str, batch: Any) -> ShardwrightError:
    names: Iterator[Any] = iter(batch) if isinstance(batch, Mapping) else iter(range(len(batch)))
    first = next(names, "x")
    return ShardwrightError(
        what,
        means=f"the model is called with the entries of the batch: {_entries(batch)}",
        change="inputs=, which names the entries that the model is given, or the batch",
        works=f"inputs=({first!r},), and a loss that takes the others from the batch",
    )


def _entries(batch: Any) -> str:
    return ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"{len(batch)} in order"
