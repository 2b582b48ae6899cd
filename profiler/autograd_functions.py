"""The user's own autograd.Functions, captured with the backward that they wrote.

torch.export traces the forward of a Function and forgets its backward. So while a model is exported each call becomes
one op, shardwright::autograd_function, whose key names what replay.py traced of it. When the joint graph of a segment
is traced the op runs that again under autograd: forward and backward end in the graph as plain ops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.autograd.function import Function
from torch.utils import _pytree as pytree

from ..errors import ExitCode, ShardwrightError
from . import _torch
from .replay import Again, Replayed, Run, trace
from .where import place_of, users_line

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
_LIBRARY.define("autograd_function(Tensor[] tensors, str key) -> Tensor[]")
_LIBRARY.define("opaque_function(Tensor[] tensors, str key) -> Tensor[]")  # the same where nothing differentiates

_replayed: dict[str, Replayed] = {}
_original = Function.__dict__["apply"]
OP = torch.ops.shardwright.autograd_function.default
OPAQUE = torch.ops.shardwright.opaque_function.default


def _kernel(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    return _replayed[key.partition("@")[0]](tensors)  # behind it: which hook, until it is placed


def _opaque_kernel(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    results = _replayed[key].without_gradient(tensors)
    return [result.clone() for result in results]  # an op of this kind gives no views


_LIBRARY.impl("autograd_function", _kernel, "CompositeImplicitAutograd")
_LIBRARY.impl("opaque_function", _opaque_kernel, "CompositeExplicitAutograd")


def replayed_of(node: fx.Node) -> Replayed:
    """Of a recorded call in a graph."""
    return _replayed[str(node.args[1]).partition("@")[0]]


class Calls:
    """The calls that one capture records."""

    def __init__(self, originals: dict[int, tuple[Any, str]]) -> None:
        self._originals = originals  # tensors of the model as the user holds them -> (module that owns it, name)
        self._keys: dict[str, str] = {}
        self.depth = 0  # above 0 what is called runs as it is: it is being traced

    def record(self, run: Run, tensors: Sequence[torch.Tensor], name: str, place: str) -> list[torch.Tensor]:
        """One op in the running trace. Raises ShardwrightError where what is called cannot be traced."""
        replayed = self.traced(run, tensors, name, place)
        return list(torch.ops.shardwright.autograd_function(self.all_tensors(tensors, replayed), self.keep(replayed)))

    def traced(self, run: Run, tensors: Sequence[torch.Tensor], name: str, place: str) -> Replayed:
        self.depth += 1
        try:
            return trace(run, tensors, name, place)
        except ShardwrightError:
            raise
        except Exception as error:
            raise _untraceable(name, place, error) from error
        finally:
            self.depth -= 1

    def all_tensors(self, tensors: Sequence[torch.Tensor], replayed: Replayed) -> list[torch.Tensor]:
        """With those that it reads without being given them: of the model's own, as they are in the trace."""
        found = list(tensors)
        for tensor in replayed.implicit:
            owner, slot = self._originals.get(id(tensor), (None, ""))
            found.append(tensor if owner is None else getattr(owner, slot))
        return found

    def keep(self, replayed: Replayed) -> str:
        key = f"{replayed.name}#{replayed.digest()}"
        _replayed.setdefault(key, replayed)
        return key


def _untraceable(name: str, place: str, error: Exception) -> ShardwrightError:
    reason = str(error).strip().split("\n")[0][:200]
    return ShardwrightError(
        f"{name} ({place}) cannot be traced: {type(error).__name__}: {reason}",
        means="what it does to the gradient would be lost, so the model is not captured",
        change="that code: it may depend on shapes and settings, not on the data in a tensor",
        works="torch ops alone, in its forward and its backward",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


@contextlib.contextmanager
def recorded_functions(calls: Calls) -> Iterator[None]:
    """Inside, calls of Functions that are not torch's own are recorded as ops."""

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if calls.depth or cls.__module__.partition(".")[0] == "torch" or cls is Again:
            return _apply(cls, *args, **kwargs)
        return _recorded(calls, cls, args, kwargs)

    Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Function.apply = _original  # type: ignore[method-assign]


def _apply(function: type[Function], *args: Any, **kwargs: Any) -> Any:
    return _original.__get__(None, function)(*args, **kwargs)


def _recorded(calls: Calls, cls: type[Function], args: Any, kwargs: Any) -> Any:
    leaves, tree = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    shape: list[Any] = []  # of what it returns: the results' container with positions of tensors

    def run(given: list[torch.Tensor]) -> list[torch.Tensor]:
        tensors = iter(given)
        filled = [next(tensors) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, tree)
        found = _apply(cls, *args, **kwargs)
        results = [found] if isinstance(found, torch.Tensor) else [r for r in found if isinstance(r, torch.Tensor)]
        shape[:] = [None if isinstance(found, torch.Tensor) else found]
        return results

    place = f"{place_of(cls)}, called at {users_line()}"
    replayed = calls.traced(run, tensors, cls.__qualname__, place)
    every = calls.all_tensors(tensors, replayed)
    results = list(torch.ops.shardwright.autograd_function(every, calls.keep(replayed)))
    for position, written in replayed.returned.items():
        results[position] = every[written].copy_(results[position])
    with torch.no_grad():
        for written, new in zip(replayed.written, results[replayed.num_results :], strict=True):
            every[written].copy_(new)
    if shape[0] is None:
        return results[0]
    rest = iter(results)
    return tuple(next(rest) if isinstance(r, torch.Tensor) else r for r in shape[0])


class InterpretOpaquely(fx.Interpreter):
    """Runs a graph with each recorded call as an op that no trace looks into."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(OPAQUE if target is OP else target, args, kwargs)


def see_through(module: fx.GraphModule) -> None:
    """Turn the ops of InterpretOpaquely back into recorded calls."""
    for node in module.graph.nodes:
        if node.target is OPAQUE:
            node.target = OP
    module.recompile()


@contextlib.contextmanager
def guarded_engine(calls: Calls) -> Iterator[None]:
    """Inside, gradients that the model itself takes in its forward are refused: the trace would not see them."""

    def engine(original: Any, *args: Any, accumulate_grad: bool = False, **kwargs: Any) -> Any:
        if calls.depth and not accumulate_grad:
            return original(*args, accumulate_grad=accumulate_grad, **kwargs)
        line = users_line()
        if calls.depth:
            raise ShardwrightError(
                f"{line} calls backward() inside a Function or a hook",
                means="it would add gradients to parameters that are none of its arguments, beside the graph",
                change="that line",
                works="torch.utils.checkpoint.checkpoint, or torch.autograd.grad of the Function's own arguments",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )
        raise ShardwrightError(
            f"{line} takes gradients inside the model's forward",
            means="gradients of gradients are not captured: what depends on them would be constant",
            change="that line",
            works="the derivative written out as ops of the forward, or plain PyTorch for this model",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )

    with _torch.engine_replaced(engine):
        yield
