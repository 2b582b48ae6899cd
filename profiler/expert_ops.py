"""shardwright::expert_mlp: the experts of a mixture-of-experts layer as one operator, forward and backward.

Letters: N tokens, K experts chosen for each, E experts, H hidden size, I intermediate size.

    hidden [N, H]   index [N, K] int64   weight [N, K]   gate_up [E, 2 I, H]   down [E, H, I]
    out [N, H] = sum over k of weight * down(activation(gate) * up)     pre [N, K, 2 I] = gate and up, for the backward,
                                                                        which without it computes them again

A choice outside 0..E-1 adds nothing. So a rank that holds some of the experts shifts `index` by its first one, and the
sum over ranks is the whole; and tokens are independent of each other, so they split freely.

Written out in torch ops this would be a sort, gathers and matmuls whose shapes depend on the data, or, with static
shapes, every expert applied to every token. As one operator its cost is what the chosen experts cost. Choices are
sorted by expert; the products of all experts are then one grouped product where the device has it, which asks nothing
of the host, and a loop over experts elsewhere.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from ._torch import grouped_product, takes_groups

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
INPUTS = "Tensor hidden, Tensor index, Tensor weight, Tensor gate_up, Tensor down"

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def _activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(gate)
    if activation == "relu":
        return F.relu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(grad: torch.Tensor, gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, gate, 0)
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh" if activation == "gelu_tanh" else "none")


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
        self.edges = torch.searchsorted(expert, torch.arange(num_experts + 1, device=flat.device))
        self._spans: list[tuple[int, int, int]] | None = None

    def _spans_of_experts(self) -> list[tuple[int, int, int]]:
        """(expert, its first row, the row behind its last) of those that were chosen. Waits for the device."""
        if self._spans is None:
            edges = self.edges.tolist()
            self._spans = [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(edges)) if a < b]
        return self._spans

    def products(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[M, A], [E, B, A] -> [M, B]: each row with the weights of its expert; zeros for rows of nobody."""
        if takes_groups(rows, weights):
            out = grouped_product(rows, weights.transpose(-2, -1), self.edges[1:].to(torch.int32))
            beyond = torch.arange(len(rows), device=rows.device) >= self.edges[-1]
            return out.masked_fill_(beyond.unsqueeze(1), 0)
        out = rows.new_zeros(rows.shape[0], weights.shape[1])
        for expert, start, stop in self._spans_of_experts():
            torch.mm(rows[start:stop], weights[expert].T, out=out[start:stop])
        return out

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
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    count: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [N, H], and gate and up of the choices in the order of experts: all, or `count` of them."""
    groups = _Groups(index, gate_up.shape[0], count)
    both = groups.products(hidden[groups.tokens], gate_up)
    gate, up = both.chunk(2, dim=-1)
    out = groups.products(_activate(gate, activation) * up, down)
    out = groups.of_tokens(out, weight).to(hidden.dtype)
    return out, both if groups.few else groups.back(both)


def run_experts_backward(
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    pre: torch.Tensor | None,
    activation: str,
    count: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """pre: what run_experts gave with the same count; computed again without."""
    groups = _Groups(index, gate_up.shape[0], count)
    rows, grad = hidden[groups.tokens], grad_out[groups.tokens]
    if pre is None:
        both = groups.products(rows, gate_up)
    else:
        both = pre if groups.few else pre.flatten(0, 1)[groups.order]
    scale = weight.reshape(-1, 1)[groups.order].to(grad.dtype)
    gate, up = both.chunk(2, dim=-1)
    activated = _activate(gate, activation)
    product = activated * up
    grad_product = groups.products(grad, down.transpose(-2, -1))
    grad_weight = (grad_product * product).sum(-1).to(weight.dtype)
    grad_product = grad_product * scale
    grad_gate = _activate_backward(grad_product * up, gate, activation)
    grad_both = torch.cat([grad_gate, grad_product * activated], dim=-1)
    grad_hidden = groups.of_tokens(groups.products(grad_both, gate_up.transpose(-2, -1))).to(hidden.dtype)
    grad_gate_up, grad_down = groups.outer(grad_both, rows), groups.outer(grad * scale, product)
    return grad_hidden, groups.back(grad_weight), grad_gate_up, grad_down


def _run(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return run_experts(*operands)


def _run_backward(*operands: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return run_experts_backward(*operands)


def forward_fake(
    hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of any operator with these operands first."""
    torch._check(hidden.dim() == 2 and index.dim() == 2 and hidden.shape[0] == index.shape[0])
    return hidden.new_empty(hidden.shape), hidden.new_empty(*index.shape, gate_up.shape[1])


def backward_fake(
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    like = (hidden, weight, gate_up, down)
    return tuple(t.new_empty(t.shape) for t in like)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, grad_out: torch.Tensor, _grad_pre: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.shardwright.expert_mlp_backward(grad_out, *ctx.saved_tensors, ctx.activation)
    grad_hidden, grad_weight, grad_gate_up, grad_down = grads
    return grad_hidden, None, grad_weight, grad_gate_up, grad_down, None


_LIBRARY.define(f"expert_mlp({INPUTS}, str activation) -> (Tensor out, Tensor pre)")
_LIBRARY.define(
    f"expert_mlp_backward(Tensor grad_out, {INPUTS}, Tensor? pre, str activation) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_gate_up, Tensor grad_down)"
)
_LIBRARY.impl("expert_mlp", _run, "CompositeExplicitAutograd")
_LIBRARY.impl("expert_mlp_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("shardwright::expert_mlp", forward_fake, lib=_LIBRARY)
torch.library.register_fake("shardwright::expert_mlp_backward", backward_fake, lib=_LIBRARY)
torch.library.register_autograd("shardwright::expert_mlp", _gradients, setup_context=_setup_context, lib=_LIBRARY)


@register_flop_formula(torch.ops.shardwright.expert_mlp)
def expert_mlp_flops(hidden: Any, index: Any, weight: Any, gate_up: Any, down: Any, *_: Any, **__: Any) -> int:
    """Two matmuls for each chosen expert of each token; a multiply and an add count as two."""
    choices = index[0] * index[1]
    return 2 * choices * (gate_up[1] * gate_up[2] + down[1] * down[2])


@register_flop_formula(torch.ops.shardwright.expert_mlp_backward)
def expert_mlp_backward_flops(grad_out: Any, *inputs: Any, **__: Any) -> int:
    """Twice the forward: each matmul's two gradients."""
    return 2 * expert_mlp_flops(*inputs)
