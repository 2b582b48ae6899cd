"""Random numbers that a graph cannot see: of Python and NumPy, and seeds set in a forward.

torch.export runs the forward once. A number that Python draws in it becomes a constant of the graph, the same at every
step, and a seed that is set in it is forgotten. While a model is exported such calls are refused where they stand.
Validation of torch.distributions' arguments is off meanwhile, as it looks at data: values are taken to be valid.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import sys
import sysconfig
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from ..errors import ExitCode, ShardwrightError

_STATES = ("getstate", "setstate", "get_state", "set_state")  # draw nothing
_NUMPY_TOO = ("seed", "default_rng", "ranf", "sample")  # functions of numpy.random that are no methods
_KINDS, _NUMPY_KINDS = ("Random", "SystemRandom"), ("RandomState", "Generator")
_SEEDS = ("manual_seed", "seed", "set_rng_state")
_LIBRARIES = (
    "torch",
    "sympy",
    "mpmath",
    "networkx",
    "numpy",
    "triton",
    "filelock",
)  # draw for their own ends
_PLACES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_CONSTANT = "a graph keeps the number that was drawn as it was captured, the same at every step"


@contextlib.contextmanager
def refused_outside_random(model: nn.Module) -> Iterator[None]:
    """The functions are replaced where they stand, and by whatever name the user's modules and the model have them."""
    own = _own_modules(model)
    before = _generators(model, own)
    guarded: dict[int, Callable[..., Any]] = {}
    with contextlib.ExitStack() as stack:
        for owner, shown, names in _owners():
            for name in names:
                original = getattr(owner, name)
                guarded.setdefault(id(original), _refusing(original, f"{shown}.{name}"))
                stack.callback(setattr, owner, name, original)
                setattr(owner, name, guarded[id(original)])
        for space in (*own, *map(vars, model.modules())):
            for name, held in list(space.items()):
                if id(held) in guarded:
                    stack.callback(space.__setitem__, name, held)
                    space[name] = guarded[id(held)]
        stack.callback(Distribution.set_default_validate_args, Distribution._validate_args)
        Distribution.set_default_validate_args(False)
        yield
        _refuse_used(before)


def _own_modules(model: nn.Module) -> list[dict[str, Any]]:
    """The names of all modules that are the user's, and of those that the model's classes come from."""
    classes = {type(module).__module__ for module in model.modules()}
    found = []
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or name.partition(".")[0] in _LIBRARIES:
            continue
        path = vars(module).get("__file__") or ""
        if name in classes or not (path.startswith(_PLACES) or "site-packages" in path or "dist-packages" in path):
            found.append(vars(module))
    return found


def _owners() -> Iterator[tuple[Any, str, tuple[str, ...]]]:
    yield random, "random", (*_methods(random, random._inst), *_KINDS)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield (
            numpy.random,
            "numpy.random",
            (*_methods(numpy.random, numpy.random.mtrand._rand), *_NUMPY_TOO, *_NUMPY_KINDS),
        )
    yield os, "os", ("urandom",)
    yield secrets, "secrets", ("choice", "randbelow", "randbits", "token_bytes", "token_hex", "token_urlsafe")
    yield uuid, "uuid", ("uuid1", "uuid4")
    yield torch, "torch", _SEEDS
    yield torch.random, "torch.random", _SEEDS


def _methods(owner: ModuleType, hidden: Any) -> tuple[str, ...]:
    """The functions of a module that are methods of its hidden generator, and draw or seed."""
    methods = [name for name, held in vars(owner).items() if getattr(held, "__self__", None) is hidden]
    return tuple(name for name in methods if not name.startswith("_") and name not in _STATES)


def _generators(model: nn.Module, sources: list[dict[str, Any]]) -> list[tuple[str, Any, str]]:
    """Generators of Python's and NumPy's that the model or its code holds: name, generator, state."""
    numpy = sys.modules.get("numpy")
    kinds = (random.Random, numpy.random.Generator, numpy.random.RandomState) if numpy else (random.Random,)
    held = [(f"{type(m).__name__}.{name}", value) for m in model.modules() for name, value in vars(m).items()]
    held += [(f"{space.get('__name__')}.{name}", value) for space in sources for name, value in list(space.items())]
    return [(name, value, _state(value)) for name, value in held if isinstance(value, kinds)]


def _state(generator: Any) -> str:
    if isinstance(generator, random.Random):
        return repr(generator.getstate())
    bits = getattr(generator, "bit_generator", None)
    return repr(generator.get_state() if bits is None else bits.state)


def _refuse_used(before: list[tuple[str, Any, str]]) -> None:
    for name, generator, state in before:
        if _state(generator) != state:
            raise ShardwrightError(
                f"the forward draws from {name}, a generator of {type(generator).__module__.partition('.')[0]}",
                means=_CONSTANT,
                change="where the forward uses it: draw with torch",
                works="torch.rand((), device=x.device)",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )


def _refusing(original: Callable[..., Any], shown: str) -> Any:
    """In its place; a class stays one, as far as isinstance goes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ and frame.f_back is not None:
            frame = frame.f_back
        if _is_library(frame):
            return original(*args, **kwargs)
        caller = traceback.extract_stack(frame, limit=1)[0]
        raise ShardwrightError(
            f"the forward calls {shown} at {caller.filename}:{caller.lineno}: {caller.line}",
            means=_CONSTANT
            if not shown.startswith("torch")
            else "a graph holds no seeds: random numbers follow from the seed of the workload, the step and the op",
            change="that line: draw with torch, or switch off the setting of the model that leads there",
            works="torch.rand((), device=x.device)" if not shown.startswith("torch") else "Workload(seed=0)",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )

    return (
        _RefusingKind(original.__name__, (), {"original": original, "call": call})
        if isinstance(original, type)
        else call
    )


class _RefusingKind(type):
    """Stands for a class whose instances the forward must not make."""

    original: Any
    call: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.call(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)

    def __instancecheck__(cls, thing: Any) -> bool:
        return isinstance(thing, cls.original)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.original)


def _is_library(frame: FrameType) -> bool:
    """Python's own modules, packages that draw while they trace, and code that those generate."""
    filename = frame.f_code.co_filename
    parts = Path(filename).parts
    if "site-packages" in parts:
        return parts[len(parts) - parts[::-1].index("site-packages")].partition(".")[0] in _LIBRARIES
    if filename.startswith("<"):
        return frame.f_globals.get("__name__") != "__main__"  # typed in by hand, or given with -c
    return Path(filename).is_relative_to(Path(random.__file__).parent)
