"""shardwright::expert_mlp: the experts of a mixture-of-experts layer as one operator, forward and backward.

Letters: N tokens, K experts chosen for each, E experts, H hidden size, I intermediate size.

    hidden [N, H]   index [N, K] int64   weight [N, K]   gate_up [E, A, H]   down [E, H, I]
    overload "bias": gate_up_bias [E, A]   down_bias [E, H]
    out [N, H] = sum over k of weight * down(activation(both))          pre [N, K, A] = both = gate_up(hidden), for the
                                                                        backward, which without it computes it again

activation: a name, or the text of a traced function (gates.py), that makes [M, I] of [M, A]; of those with a name A is
2 I, gate and up side by side.

A choice outside 0..E-1 adds nothing. So a rank that holds some of the experts shifts `index` by its first one, and the
sum over ranks is the whole; and tokens are independent of each other, so they split freely.

Written out in torch ops this would be a sort, gathers and matmuls whose shapes depend on the data, or, with static
shapes, every expert applied to every token. As one operator its cost is what the chosen experts cost. Choices are
sorted by expert; the products of all experts are then one grouped product where the device has it, which asks nothing
of the host, and a loop over experts elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._torch import grouped_product, takes_groups
from .gates import ACTIVATIONS, gate_of

__all__ = ["ACTIVATIONS", "BIASES", "INPUTS", "WEIGHTS", "ExpertsBackward", "run_experts", "run_experts_backward"]

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
ROWS = 2  # behind the results of a forward: tokens that came to this rank's experts, where they are sent to them
INPUTS = "Tensor hidden, Tensor index, Tensor weight, Tensor gate_up, Tensor down"

BIASES = "Tensor gate_up_bias, Tensor down_bias"
# number of operands that hold experts, by the overload: weights, and biases beside them
WEIGHTS = {"default": 2, "bias": 4}


class _Groups:
    """Choices in the order of experts. order: positions in the flattened [N * K] choices, those of nobody's last.
    edges: [E + 1], where the rows of each expert begin among them. count: how many choices are of an expert here, where
    that is known: no others are looked at then."""

    def __init__(self, index: torch.Tensor, num_experts: int, count: int | None) -> None:
        flat = index.reshape(-1)
        expert = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
        expert, order = torch.sort(expert, stable=True)
        self.index, self.few = index, count is not None
        self.order = order if count is None else order[:count]
        self.tokens = self.order // max(index.shape[1], 1)
        self.experts = expert if count is None else expert[:count]
        self.edges = torch.searchsorted(expert, torch.arange(num_experts + 1, device=flat.device))
        self._spans: list[tuple[int, int, int]] | None = None

    def _spans_of_experts(self) -> list[tuple[int, int, int]]:
        """(expert, its first row, the row behind its last) of those that were chosen. Waits for the device."""
        if self._spans is None:
            edges = self.edges.tolist()
            self._spans = [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(edges)) if a < b]
        return self._spans

    def products(self, rows: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[M, A], [E, B, A], [E, B] -> [M, B]: each row with the weights of its expert; zeros for rows of nobody."""
        if takes_groups(rows, weights):
            out = grouped_product(rows, weights.transpose(-2, -1), self.edges[1:].to(torch.int32))
            beyond = torch.arange(len(rows), device=rows.device) >= self.edges[-1]
            out = out.masked_fill_(beyond.unsqueeze(1), 0)
            return out if bias is None else out.add_(self.of_rows(bias))
        out = rows.new_zeros(rows.shape[0], weights.shape[1])
        for expert, start, stop in self._spans_of_experts():
            torch.mm(rows[start:stop], weights[expert].T, out=out[start:stop])
            if bias is not None:
                out[start:stop] += bias[expert]
        return out

    def of_rows(self, bias: torch.Tensor) -> torch.Tensor:
        """[E, B] -> [M, B]: of each row's expert; zeros for rows of nobody."""
        return torch.cat([bias, bias.new_zeros(1, bias.shape[1])])[self.experts]

    def sums(self, rows: torch.Tensor, num_experts: int) -> torch.Tensor:
        """[M, B] -> [E, B]: of the rows of each expert, in float32 at least."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros(num_experts + 1, rows.shape[1], dtype=wide, device=rows.device)
        return total.index_add_(0, self.experts, rows.to(wide))[:num_experts].to(rows.dtype)

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """[M, A], [M, B] -> [E, A, B]: of the rows of each expert."""
        if takes_groups(left, right):
            return grouped_product(left.t(), right, self.edges[1:].to(torch.int32))
        out = left.new_zeros(len(self.edges) - 1, left.shape[1], right.shape[1])
        for expert, start, stop in self._spans_of_experts():
            torch.mm(left[start:stop].T, right[start:stop], out=out[expert])
        return out

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """[M, ...] -> [N, K, ...]: rows where the choices are that they belong to, zeros elsewhere."""
        out = rows.new_zeros(self.index.numel(), *rows.shape[1:]) if self.few else torch.empty_like(rows)
        out[self.order] = rows
        return out.view(*self.index.shape, *rows.shape[1:])

    def of_tokens(self, rows: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """[M, H] -> [N, H]: the sum over a token's choices, each times its weight."""
        if not self.few:
            each = self.back(rows)
            return (each if weight is None else each * weight.unsqueeze(-1)).sum(1)
        if weight is not None:
            rows = rows * weight.reshape(-1, 1)[self.order]
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros(self.index.shape[0], rows.shape[1], dtype=wide, device=rows.device)
        return total.index_add_(0, self.tokens, rows.to(wide))


def run_experts(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    experts: Sequence[torch.Tensor],
    activation: str,
    count: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [N, H], and what the first product gives for the choices in the order of experts: all, or `count` of them.
    experts: gate_up and down, and their biases where they have any."""
    gate_up, down, *biases = experts
    up_bias, down_bias = biases or (None, None)
    groups = _Groups(index, gate_up.shape[0], count)
    both = groups.products(hidden[groups.tokens], gate_up, up_bias)
    out = groups.products(gate_of(activation).forward(both), down, down_bias)
    out = groups.of_tokens(out, weight).to(hidden.dtype)
    return out, both if groups.few else groups.back(both)


class ExpertsBackward:
    """Gradients of tokens and choices' weights, and then, of what these leave, those of the experts."""

    def __init__(
        self,
        grad_out: torch.Tensor,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weight: torch.Tensor,
        experts: Sequence[torch.Tensor],
        pre: torch.Tensor | None,
        activation: str,
        count: int | None = None,
    ) -> None:
        """pre: what run_experts gave with the same count; computed again without."""
        self.gate_up, self.down, *biases = experts
        self.up_bias: torch.Tensor | None = biases[0] if biases else None
        self.down_bias: torch.Tensor | None = biases[1] if biases else None
        self.groups = _Groups(index, self.gate_up.shape[0], count)
        self.rows, self.grad = hidden[self.groups.tokens], grad_out[self.groups.tokens]
        self.pre, self.activation, self.weight = pre, activation, weight

    def of_inputs(self) -> list[torch.Tensor]:
        """[N, H], [N, K]"""
        groups, grad = self.groups, self.grad
        if self.pre is None:
            both = groups.products(self.rows, self.gate_up, self.up_bias)
        else:
            both = self.pre if groups.few else self.pre.flatten(0, 1)[groups.order]
        self.pre = None
        scale = self.weight.reshape(-1, 1)[groups.order].to(grad.dtype)
        grad_product = groups.products(grad, self.down.transpose(-2, -1))
        self.product, self.grad_both = gate_of(self.activation).backward(both, grad_product * scale)
        grad_weight = (grad_product * self.product).sum(-1)
        if self.down_bias is not None:
            grad_weight += (grad * groups.of_rows(self.down_bias)).sum(-1)
        del both, grad_product
        grad_hidden = groups.of_tokens(groups.products(self.grad_both, self.gate_up.transpose(-2, -1)))
        self.grad = grad * scale
        return [grad_hidden.to(grad.dtype), groups.back(grad_weight.to(self.weight.dtype))]

    def of_experts(self) -> Iterator[torch.Tensor]:
        """Of gate_up and down, and of their biases where they have any. Each is computed when it is asked for."""
        groups = self.groups
        yield groups.outer(self.grad_both, self.rows)
        yield groups.outer(self.grad, self.product)
        if self.down_bias is not None:
            yield groups.sums(self.grad_both, len(self.gate_up))
            yield groups.sums(self.grad, len(self.gate_up))


def run_experts_backward(*operands: Any) -> tuple[torch.Tensor, ...]:
    """Gradients of hidden, weight and the experts. operands: of ExpertsBackward."""
    work = ExpertsBackward(*operands)
    return *work.of_inputs(), *work.of_experts()


def _run(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, index, weight, *experts, activation = operands
    return run_experts(hidden, index, weight, experts, activation)


def _run_backward(*operands: Any) -> tuple[torch.Tensor, ...]:
    grad_out, hidden, index, weight, *experts, pre, activation = operands
    return run_experts_backward(grad_out, hidden, index, weight, experts, pre, activation)


def forward_fake(
    hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of any operator with these operands first."""
    torch._check(hidden.dim() == 2 and index.dim() == 2 and hidden.shape[0] == index.shape[0])
    return hidden.new_empty(hidden.shape), hidden.new_empty(*index.shape, gate_up.shape[1])


def backward_fake(grad_out: torch.Tensor, *operands: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    """Of any operator with these operands first, and no other tensor behind them but one that may be missing."""
    hidden, _, *rest = operands
    weight, *experts = rest[: 3 + 2 * _has_biases(operands)]
    return tuple(t.new_empty(t.shape) for t in (hidden, weight, *experts))


def _has_biases(operands: Sequence[Any]) -> bool:
    """hidden, index, weight, gate_up, down, and then gate_up_bias [E, A], or pre [N, K, A], or no tensor."""
    return isinstance(operands[5], torch.Tensor) and operands[5].dim() == 2


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, grad_out: torch.Tensor, _grad_pre: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    backward = torch.ops.shardwright.expert_mlp_backward
    overload = backward.bias if len(ctx.saved_tensors) > 6 else backward.default
    grad_hidden, *others = overload(grad_out, *ctx.saved_tensors, ctx.activation)
    return grad_hidden, None, *others, None


def results(overload: str) -> str:
    """Of a backward, in its schema."""
    names = ("hidden", "weight", "gate_up", "down", "gate_up_bias", "down_bias")[: 2 + WEIGHTS[overload]]
    return f"({', '.join(f'Tensor grad_{name}' for name in names)})"


for _overload, _operands in (("default", INPUTS), ("bias", f"{INPUTS}, {BIASES}")):
    _forward, _backward = (
        f"{_name}.{_overload}".removesuffix(".default") for _name in ("expert_mlp", "expert_mlp_backward")
    )
    _LIBRARY.define(f"{_forward}({_operands}, str activation) -> (Tensor out, Tensor pre)")
    _LIBRARY.define(f"{_backward}(Tensor grad_out, {_operands}, Tensor? pre, str activation) -> {results(_overload)}")
    _LIBRARY.impl(_forward, _run, "CompositeExplicitAutograd")
    _LIBRARY.impl(_backward, _run_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shardwright::{_forward}", forward_fake, lib=_LIBRARY)
    torch.library.register_fake(f"shardwright::{_backward}", backward_fake, lib=_LIBRARY)
    torch.library.register_autograd(f"shardwright::{_forward}", _gradients, setup_context=_setup_context, lib=_LIBRARY)


@register_flop_formula(torch.ops.shardwright.expert_mlp)
def expert_mlp_flops(hidden: Any, index: Any, weight: Any, gate_up: Any, down: Any, *_: Any, **__: Any) -> int:
    """Two matmuls for each chosen expert of each token; a multiply and an add count as two."""
    choices = index[0] * index[1]
    return 2 * choices * (gate_up[1] * gate_up[2] + down[1] * down[2])


@register_flop_formula(torch.ops.shardwright.expert_mlp_backward)
def expert_mlp_backward_flops(grad_out: Any, *inputs: Any, **__: Any) -> int:
    """Twice the forward: each matmul's two gradients."""
    return 2 * expert_mlp_flops(*inputs)
