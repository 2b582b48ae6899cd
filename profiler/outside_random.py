"""Random numbers that a graph cannot see: of Python and NumPy, and seeds set in a forward.

torch.export runs the forward once. A number that Python draws in it becomes a constant of the graph, the same at every
step, and a seed that is set in it is forgotten. While a model is exported such calls are refused where they stand.
Validation of torch.distributions' arguments is off meanwhile, as it looks at data: values are taken to be valid.
"""

from __future__ import annotations

import contextlib
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributions import Distribution

from ..errors import ExitCode, ShardwrightError

_PYTHON = ("random", "uniform", "randint", "randrange", "choice", "choices", "sample", "shuffle", "gauss",
           "normalvariate", "betavariate", "expovariate", "triangular", "getrandbits", "seed")  # fmt: skip
_NUMPY = ("rand", "randn", "random", "random_sample", "randint", "choice", "shuffle", "permutation", "normal",
          "uniform", "beta", "binomial", "poisson", "exponential", "gamma", "standard_normal", "dirichlet",
          "multinomial", "seed", "default_rng", "RandomState")  # fmt: skip
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


@contextlib.contextmanager
def refused_outside_random() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in _PYTHON:
            _guard(stack, random, name, f"random.{name}")
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            for name in _NUMPY:
                _guard(stack, numpy.random, name, f"numpy.random.{name}")
        for name in _SEEDS:
            _guard(stack, torch, name, f"torch.{name}")
            _guard(stack, torch.random, name, f"torch.random.{name}")
        stack.callback(Distribution.set_default_validate_args, Distribution._validate_args)
        Distribution.set_default_validate_args(False)
        yield


def _guard(stack: contextlib.ExitStack, owner: Any, name: str, shown: str) -> None:
    original = getattr(owner, name)
    stack.callback(setattr, owner, name, original)
    setattr(owner, name, _refusing(original, shown))


def _refusing(original: Callable[..., Any], shown: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        caller = traceback.extract_stack(limit=2)[0]
        if _is_library(caller.filename):
            return original(*args, **kwargs)
        raise ShardwrightError(
            f"the forward calls {shown} at {caller.filename}:{caller.lineno}: {caller.line}",
            means="a graph keeps the number that was drawn as it was captured, the same at every step"
            if not shown.startswith("torch")
            else "a graph holds no seeds: random numbers follow from the seed of the workload, the step and the op",
            change="that line: draw with torch, or switch off the setting of the model that leads there",
            works="torch.rand((), device=x.device)" if not shown.startswith("torch") else "Workload(seed=0)",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )

    return call


def _is_library(filename: str) -> bool:
    """Python's own modules, and packages that draw while they trace."""
    parts = Path(filename).parts
    if "site-packages" in parts:
        return parts[len(parts) - parts[::-1].index("site-packages")].partition(".")[0] in _LIBRARIES
    return Path(filename).is_relative_to(Path(random.__file__).parent) or filename.startswith("<")
