"""Optimizers as users write them: what they keep is no tensor, is made late, or belongs to no parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _Own(torch.optim.Optimizer):
    def __init__(self, params: Any, rate: float = 1e-2) -> None:
        super().__init__(params, {"rate": rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        self.begin()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.update(p, self.state[p]), alpha=group["rate"])

    def begin(self) -> None:
        pass

    def update(self, p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        raise NotImplementedError


class CountsInPython(_Own):
    def update(self, p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        state["step"] = state.get("step", 0) + 1
        state["mean"] = state.get("mean", torch.zeros_like(p)).mul(0.9).add(p.grad, alpha=0.1)
        return state["mean"] / (1 - 0.9 ** state["step"])


class KeepsMoreLater(_Own):
    def update(self, p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        state["step"] = state.get("step", 0) + 1
        if state["step"] < 2:
            return p.grad
        state["slow"] = state.get("slow", torch.zeros_like(p)).mul(0.5).add(p.grad)
        return state["slow"]


class CountsForAll(_Own):
    def begin(self) -> None:
        self.state["calls"] = self.state.get("calls", 0) + 1

    def update(self, p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        return p.grad / self.state["calls"]


class DividesByTheNormOfAll(_Own):
    def begin(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = sum(grad.square().sum() for grad in grads) ** 0.5

    def update(self, p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        return p.grad / self.norm


class AddsNoise(_Own):
    def update(self, p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        return p.grad + 0.01 * torch.randn_like(p)


class TakesMatrices(_Own):
    def update(self, p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        if p.dim() != 2:
            raise ValueError("matrices alone")
        return p.grad


class ScalesByTheNormOfMatrices(DividesByTheNormOfAll):
    def update(self, p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        if p.dim() != 2:
            raise ValueError("matrices alone")
        return super().update(p, state)


class HasAnArgumentOfItsOwn(_Own):
    """Which is not among its defaults."""

    def __init__(self, params: Any, scale: float, rate: float = 1e-2) -> None:
        super().__init__(params, rate)
        self.scale = scale

    def update(self, p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        return self.scale * p.grad


class KeepsAList(_Own):
    def update(self, p: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        state["history"] = [*state.get("history", []), float(p.grad.norm())]
        return p.grad
