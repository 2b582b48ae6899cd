"""Does an optimizer's step of one parameter depend on the others? Then a rank that holds a stage alone steps otherwise.

Found out by trying: two small parameters are stepped together, and each alone; two matrices, where it takes no vectors.
Random ops draw from the same seed each time, so that noise does not depend on how many are stepped. torch's own
optimizers do not depend on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ExitCode, ShardwrightError, first_line

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
_SHAPES: tuple[Shapes, ...] = (((4, 3), (5,)), ((4, 3), (5, 2)))
_STEPS = 2


def refuse_coupled(name: str, make: Callable[..., Any], options: Mapping[str, Any], num_stages: int) -> None:
    """Raises ShardwrightError. num_stages: ranks of the pipeline, each with parameters of its own."""
    if num_stages == 1 or (getattr(make, "__module__", None) or "").startswith("torch.optim"):
        return
    try:
        coupled = _is_coupled(make, options)
    except Exception as error:  # the user's code, which may raise anything where parameters are not its own
        raise _not_known(name, error, num_stages) from error
    if coupled:
        raise ShardwrightError(
            f"{name} steps a parameter by what the other parameters or their gradients are",
            means=f"each of the {num_stages} ranks of the pipeline would step by its own stages alone",
            change="pp, or the optimizer",
            works='--force pp=1 (force={"pp": 1}), where every rank sees all parameters',
            exit_code=ExitCode.CONTRADICTION,
        )


def _not_known(name: str, error: Exception, num_stages: int) -> ShardwrightError:
    return ShardwrightError(
        f"{name} could not be tried on two small parameters: {type(error).__name__}: {first_line(error)}",
        means="whether it steps a parameter by what others are is not known, and each of the "
        f"{num_stages} ranks of the pipeline would step by its own stages alone",
        change="pp, or the optimizer",
        works='--force pp=1 (force={"pp": 1}), where every rank sees all parameters; or an optimizer that steps '
        "matrices of any size and is made by its parameters and its defaults",
        exit_code=ExitCode.CONTRADICTION,
    )


def _is_coupled(make: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    """Raises whatever the optimizer does where it steps neither a matrix and a vector nor two matrices."""
    for shapes in _SHAPES:
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                together = _stepped(make, options, shapes, (0, 1))
                alone = [tensor for i in (0, 1) for tensor in _stepped(make, options, shapes, (i,))]
        except Exception:  # as above; of the last shapes it is said
            if shapes is _SHAPES[-1]:
                raise
            continue
        return not all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(together, alone, strict=True))
    raise AssertionError("the last shapes either return or raise")


class _SameDraws(TorchDispatchMode):
    """Every random op draws as the first one after a seed, whatever was drawn before it for other parameters."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            if (own := kwargs.get("generator")) is None:
                torch.manual_seed(0)
            else:  # the user's, which is not to be moved
                kwargs["generator"] = torch.Generator(own.device).manual_seed(0)
        return func(*args, **kwargs)


def _stepped(
    make: Callable[..., Any], options: Mapping[str, Any], shapes: Shapes, chosen: tuple[int, ...]
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(1 + _STEPS)]
    parameters = [nn.Parameter(drawn[0][i].clone()) for i in chosen]
    optimizer = make(parameters, **options)
    if type(optimizer).__module__.startswith("torch.optim"):
        return [drawn[0][i] for i in chosen]
    for row in drawn[1:]:
        for parameter, i in zip(parameters, chosen, strict=True):
            parameter.grad = row[i].clone()
        with _SameDraws():
            optimizer.step()
    return [parameter.detach() for parameter in parameters]
