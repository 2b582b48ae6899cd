"""Does an optimizer's step of one parameter depend on the others? Then a rank that holds a stage alone steps otherwise.

Found out by trying: two small parameters are stepped together, and each alone. torch's own do not depend on others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..errors import ExitCode, ShardwrightError

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
_SHAPES, _STEPS = ((4, 3), (5,)), 2


def refuse_coupled(name: str, make: Make, num_stages: int) -> None:
    """Raises ShardwrightError. num_stages: ranks of the pipeline, each with parameters of its own."""
    if num_stages == 1 or not _is_coupled(make):
        return
    raise ShardwrightError(
        f"{name} steps a parameter by what the other parameters or their gradients are",
        means=f"each of the {num_stages} ranks of the pipeline would step by its own stages alone",
        change="pp, or the optimizer",
        works='--force pp=1 (force={"pp": 1}), where every rank sees all parameters',
        exit_code=ExitCode.CONTRADICTION,
    )


def maker_of(optimizer: torch.optim.Optimizer) -> Make:
    return lambda parameters: type(optimizer)(parameters, **optimizer.defaults)


def _is_coupled(make: Make) -> bool:
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            together = _stepped(make, (0, 1))
            alone = [*_stepped(make, (0,)), *_stepped(make, (1,))]
    except Exception:  # the user's code, which may raise anything where parameters are not those it was written for
        return False
    return not all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(together, alone, strict=True))


def _stepped(make: Make, chosen: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(shape, generator=generator) for shape in _SHAPES] for _ in range(1 + _STEPS)]
    parameters = [nn.Parameter(drawn[0][i].clone()) for i in chosen]
    optimizer = make(parameters)
    if type(optimizer).__module__.startswith("torch.optim"):
        return [drawn[0][i] for i in chosen]
    for row in drawn[1:]:
        for parameter, i in zip(parameters, chosen, strict=True):
            parameter.grad = row[i].clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]
